"""Shapes of the networks: every number that a checkpoint dictates, without defaults."""

import dataclasses
import math
import re
from typing import Literal

Activation = Literal["quick_gelu", "gelu"]
FeatureSelect = Literal["patch", "cls_patch"]
MAX_LAYERS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a CLIP vision transformer (`CLIPVisionConfig` of transformers)."""

    image_size: int
    patch_size: int
    embed_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    norm_eps: float
    activation: Activation

    def __post_init__(self) -> None:
        _require_positive(self, "image_size", "patch_size", "embed_dim", "hidden_dim", "num_layers", "num_heads")
        _require_divides("vision.patch_size", self.patch_size, "vision.image_size", self.image_size)
        _require_above_zero(self, "norm_eps")
        _require_divides("vision.num_heads", self.num_heads, "vision.embed_dim", self.embed_dim)
        _require_choice("vision.activation", self.activation, ("quick_gelu", "gelu"))

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Shape of CLIP's text transformer (`CLIPTextConfig` of transformers)."""

    vocab_size: int
    context_length: int
    embed_dim: int
    hidden_dim: int
    num_layers: int
    num_heads: int
    norm_eps: float
    activation: Activation
    eos_id: int

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "context_length", "embed_dim", "hidden_dim", "num_layers", "num_heads")
        _require_above_zero(self, "norm_eps")
        _require_divides("caption.num_heads", self.num_heads, "caption.embed_dim", self.embed_dim)
        _require_choice("caption.activation", self.activation, ("quick_gelu", "gelu"))
        if not 0 <= self.eos_id < self.vocab_size:
            raise ValueError(
                f"caption.eos_id must be a token of the vocabulary; got eos_id={self.eos_id}, "
                f"vocab_size={self.vocab_size}. Take both from the tokenizer."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Shape of CLIP's two towers and their shared space (Radford et al., arXiv 2103.00020)."""

    vision: VisionConfig
    caption: CaptionConfig
    projection_dim: int

    def __post_init__(self) -> None:
        _require_positive(self, "projection_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (`rope_type` linear of transformers)."""

    factor: float

    def __post_init__(self) -> None:
        _require_scaling(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow rotations divided by `factor`, quick ones kept (`rope_type` llama3 of transformers).

    A rotation is slow that turns fewer than `low_frequency_factor` times within `original_positions`, quick one
    that turns more than `high_frequency_factor` times; between them the two are mixed.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        _require_scaling(self.factor)
        _require_positive(self, "original_positions")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                "rope_scaling needs 0 < low_frequency_factor < high_frequency_factor; got "
                f"{self.low_frequency_factor} and {self.high_frequency_factor}."
            )


RopeScaling = LinearScaling | Llama3Scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Shape of a Llama-family decoder (`LlamaConfig`, `MistralConfig` of transformers)."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    hidden_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    max_positions: int
    tie_embeddings: bool
    sliding_window: int | None

    def __post_init__(self) -> None:
        _require_positive(
            self, "vocab_size", "num_layers", "embed_dim", "hidden_dim", "num_heads", "num_kv_heads", "head_dim"
        )
        _require_positive(self, "max_positions")
        _require_above_zero(self, "rope_theta", "norm_eps")
        _require_divides("text.num_kv_heads", self.num_kv_heads, "text.num_heads", self.num_heads)
        _require_divides("2", 2, "text.head_dim", self.head_dim)
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"text.sliding_window must be None or at least 1; got {self.sliding_window}. "
                "Use None for full causal attention."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """A tower, a projector and a decoder (`LlavaConfig` of transformers, `llava_arch.py` of the original).

    `projector` is the original's name: `linear`, `mlpNx_gelu` or `identity`.
    `select_layer` indexes the tower's hidden states, the embedding output being number 0, as
    `mm_vision_select_layer` does: -2 is the output of the layer before the last. `image_newline` says whether the
    model has the vector of that name, which ends every row of patches where pictures are merged `spatial_unpad`.
    """

    vision: VisionConfig
    text: TextConfig
    projector: str
    select_layer: int
    select_feature: FeatureSelect
    image_newline: bool

    def __post_init__(self) -> None:
        _require_choice("select_feature", self.select_feature, ("patch", "cls_patch"))
        if self.projector_depth == 0 and self.vision.embed_dim != self.text.embed_dim:
            raise ValueError(
                "The identity projector needs equal widths; got "
                f"vision.embed_dim={self.vision.embed_dim}, text.embed_dim={self.text.embed_dim}. "
                "Use linear or mlp2x_gelu."
            )
        if not -self.vision.num_layers - 1 <= self.select_layer <= self.vision.num_layers:
            raise ValueError(
                f"select_layer must index the {self.vision.num_layers + 1} hidden states of the tower; "
                f"got select_layer={self.select_layer}. The original uses -2."
            )

    @property
    def projector_depth(self) -> int:
        """Number of linear layers in the projector."""
        if self.projector == "identity":
            return 0
        if self.projector == "linear":
            return 1
        match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", self.projector)
        if match is None:
            raise ValueError(
                f"projector must be linear, mlpNx_gelu or identity; got {self.projector!r}. LLaVA-1.5 uses mlp2x_gelu."
            )
        return int(match.group(1))

    @property
    def tower_depth(self) -> int:
        """Number of tower layers that the selected features pass through."""
        if self.select_layer < 0:
            return self.vision.num_layers + 1 + self.select_layer
        return self.select_layer

    @property
    def num_features(self) -> int:
        """Slots that one tile takes in the decoder's sequence."""
        return self.vision.num_patches + (self.select_feature == "cls_patch")


ModelConfig = LlavaConfig | ClipConfig


def _require_scaling(factor: float) -> None:
    if not 1 <= factor < math.inf:
        raise ValueError(f"rope_scaling.factor must be at least 1 and finite; got {factor}.")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be at least 1; got {value}.")
        # No network has so many, and describing them would take for ever.
        if name == "num_layers" and value > MAX_LAYERS:
            raise ValueError(f"{type(config).__name__}.{name} must be at most {MAX_LAYERS}; got {value}.")


def _require_above_zero(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{type(config).__name__}.{name} must be finite and above 0; got {value}.")


def _require_divides(name: str, value: int, multiple_name: str, multiple: int) -> None:
    if multiple % value:
        raise ValueError(f"{name} must divide {multiple_name}; got {name}={value}, {multiple_name}={multiple}.")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
