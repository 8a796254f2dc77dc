"""`config.json` of Hugging Face and of the original LLaVA: from its fields to our shapes, and back."""

import dataclasses
from typing import Any, Literal

from llava_jax.convert.fields import Fields
from llava_jax.errors import CheckpointError
from llava_jax.shapes import (
    CaptionConfig,
    ClipConfig,
    LinearScaling,
    Llama3Scaling,
    LlavaConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
)
from llava_jax.sizes import CLIP_L_224, CLIP_L_336

# huggingface: llava and llava_next; original: what its `save_pretrained` writes, whatever model_type says.
Family = Literal["huggingface", "original", "decoder", "clip", "tower"]
# Towers that the original's configs name and that need not be there if the checkpoint holds their weights.
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": CLIP_L_336,
    "openai/clip-vit-large-patch14": CLIP_L_224,
}
# Defaults of transformers, which its configs leave out: `LlamaConfig`, `MistralConfig`.
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 11_008, "max_position_embeddings": 2048, "sliding_window": None, "kv_heads": None},
    "mistral": {"intermediate_size": 14_336, "max_position_embeddings": 131_072, "sliding_window": 4096, "kv_heads": 8},
}
_FEATURES: dict[str, Any] = {"default": "patch", "full": "cls_patch"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Token ids that a config states and a tokenizer need not."""

    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None
    pad_id: int | None = None
    image_id: int | None = None


def find_family(fields: Fields) -> Family:
    """What kind of model a config describes, by its fields.

    Raises:
      CheckpointError: a kind that is not supported; names it.
    """
    kind = fields.values.get("model_type")
    if "mm_vision_tower" in fields or "mm_projector_type" in fields:
        if kind in ("llava", "llava_llama", "llava_mistral", "llama", "mistral"):
            return "original"
    elif kind in ("llava", "llava_next") or (kind is None and "text_config" in fields and "vision_config" in fields):
        return "huggingface"
    elif isinstance(kind, str) and kind in _TEXT_DEFAULTS:
        return "decoder"
    elif kind == "clip":
        return "clip"
    elif kind == "clip_vision_model":
        return "tower"
    raise CheckpointError(
        f"{fields.where}: model_type={kind!r} is not supported. LLaVA (original and Hugging Face), Llama, Mistral and "
        "CLIP are."
    )


def read_text(fields: Fields, kind: Any) -> TextConfig:
    """The decoder of a `llama` or `mistral` config; the caller says when all its fields were taken."""
    if not isinstance(kind, str) or kind not in _TEXT_DEFAULTS:
        raise CheckpointError(
            f"{fields.where}: a decoder of model_type={kind!r} is not supported, only llama, mistral."
        )
    defaults = _TEXT_DEFAULTS[kind]
    fields.must_be("hidden_act", "silu")
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("attention_dropout", 0.0)
    fields.must_be("partial_rotary_factor", 1.0)
    width, num_heads = fields.take("hidden_size", int, 4096), fields.take("num_attention_heads", int, 32)
    theta, scaling = _rope(fields)
    if kind == "llama":
        fields.must_be("sliding_window")
    return _checked(
        fields,
        TextConfig,
        vocab_size=fields.take("vocab_size", int, 32_000),
        num_layers=fields.take("num_hidden_layers", int, 32),
        embed_dim=width,
        hidden_dim=fields.take("intermediate_size", int, defaults["intermediate_size"]),
        num_heads=num_heads,
        num_kv_heads=fields.take("num_key_value_heads", int, defaults["kv_heads"] or num_heads),
        head_dim=fields.take("head_dim", int, width // max(1, num_heads)),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.take("rms_norm_eps", float, 1e-6),
        max_positions=fields.take("max_position_embeddings", int, defaults["max_position_embeddings"]),
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        # Null is no window; only an absent field is the default.
        sliding_window=(
            fields.take("sliding_window", int, None)
            if "sliding_window" in fields.values or kind == "llama"
            else defaults["sliding_window"]
        ),
    )


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` of transformers 5 or the two fields before it, which must agree."""
    said = {name: _read_rope(fields.nested(name)) for name in ("rope_parameters", "rope_scaling") if name in fields}
    fields.ignore("rope_parameters", "rope_scaling")
    thetas = {"rope_theta": fields.take("rope_theta", float, None)} | {name: theta for name, (theta, _) in said.items()}
    scalings = {name: scaling for name, (_, scaling) in said.items()}
    for what, values in (("the base", {k: v for k, v in thetas.items() if v is not None}), ("scaling", scalings)):
        if len(set(values.values())) > 1:
            told = ", ".join(f"{value} in {name}" for name, value in values.items())
            raise CheckpointError(f"{fields.where}: {what} of the rotary positions is {told}. Remove all but one.")
    theta = next((value for value in thetas.values() if value is not None), 10_000.0)
    return theta, next(iter(scalings.values()), None)


def _read_rope(rope: Fields) -> tuple[float | None, RopeScaling | None]:
    theta = rope.take("rope_theta", float, None)
    kind = rope.take("rope_type", str, None) or rope.take("type", str, "default")
    rope.ignore("type", "rope_type")
    scaling: RopeScaling | None = None
    match kind:
        case "default":
            pass
        case "linear":
            scaling = _checked(rope, LinearScaling, factor=rope.take("factor", float))
        case "llama3":
            scaling = _checked(
                rope,
                Llama3Scaling,
                factor=rope.take("factor", float),
                low_frequency_factor=rope.take("low_freq_factor", float),
                high_frequency_factor=rope.take("high_freq_factor", float),
                original_positions=rope.take("original_max_position_embeddings", int),
            )
        case _:
            raise CheckpointError(
                f"{rope.where}: rope_type={kind!r} is not supported, only default, linear and llama3."
            )
    rope.done()
    return theta, scaling


def read_vision(fields: Fields, **defaults: Any) -> VisionConfig:
    """A CLIP vision tower; `defaults` replace those of `CLIPVisionConfig`."""
    default = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    default |= {"image_size": 224, "patch_size": 32} | defaults
    kind = fields.values.get("model_type")
    if kind not in (None, "clip_vision_model", "clip"):
        raise CheckpointError(f"{fields.where}: a tower of model_type={kind!r} is not supported, only CLIP's.")
    fields.must_be("num_channels", 3)
    fields.must_be("hidden_act", "quick_gelu", "gelu")
    fields.must_be("attention_dropout", 0.0)
    fields.must_be("dropout", 0.0)
    fields.ignore("projection_dim", "vocab_size", "vision_use_head")
    return _checked(
        fields,
        VisionConfig,
        image_size=fields.take("image_size", int, default["image_size"]),
        patch_size=fields.take("patch_size", int, default["patch_size"]),
        embed_dim=fields.take("hidden_size", int, default["hidden_size"]),
        hidden_dim=fields.take("intermediate_size", int, default["intermediate_size"]),
        num_layers=fields.take("num_hidden_layers", int, default["num_hidden_layers"]),
        num_heads=fields.take("num_attention_heads", int, default["num_attention_heads"]),
        norm_eps=fields.take("layer_norm_eps", float, 1e-5),
        activation=fields.take("hidden_act", str, "quick_gelu"),
    )


def read_clip(fields: Fields) -> ClipConfig:
    """Both towers of a `clip` config."""
    # Copies of the nested configs that old versions wrote beside them.
    fields.ignore("text_config_dict", "vision_config_dict")
    vision, text = fields.nested("vision_config"), fields.nested("text_config")
    text.must_be("hidden_act", "quick_gelu", "gelu")
    text.must_be("attention_dropout", 0.0)
    text.must_be("dropout", 0.0)
    text.ignore("projection_dim")
    vocab_size = text.take("vocab_size", int, 49_408)
    # Old configs say 2, whatever the tokenizer's is; transformers then reads the caption's highest id.
    eos_id = text.take("eos_token_id", int, vocab_size - 1)
    config = _checked(
        fields,
        ClipConfig,
        vision=read_vision(vision),
        caption=_checked(
            text,
            CaptionConfig,
            vocab_size=vocab_size,
            context_length=text.take("max_position_embeddings", int, 77),
            embed_dim=text.take("hidden_size", int, 512),
            hidden_dim=text.take("intermediate_size", int, 2048),
            num_layers=text.take("num_hidden_layers", int, 12),
            num_heads=text.take("num_attention_heads", int, 8),
            norm_eps=text.take("layer_norm_eps", float, 1e-5),
            activation=text.take("hidden_act", str, "quick_gelu"),
            eos_id=vocab_size - 1 if eos_id == 2 else eos_id,
        ),
        projection_dim=fields.take("projection_dim", int, 512),
    )
    vision.done()
    text.done()
    return config


def read_huggingface(fields: Fields) -> LlavaConfig:
    """A `llava` or `llava_next` config of transformers."""
    text, vision = fields.nested("text_config"), fields.nested("vision_config")
    is_next = fields.values.get("model_type") == "llava_next"
    fields.must_be("projector_hidden_act", "gelu")
    fields.must_be("multimodal_projector_bias", True)
    # A copy of the decoder's, which may have been padded since.
    fields.ignore("vocab_size", "image_token_index", "image_token_id", "image_grid_pinpoints")
    outer_tie = fields.take("tie_word_embeddings", bool, None)
    inner_tie = text.values.get("tie_word_embeddings")
    if None not in (outer_tie, inner_tie) and outer_tie != inner_tie:
        raise CheckpointError(
            f"{fields.where}: tie_word_embeddings is {outer_tie} and, in text_config, {inner_tie}. Make them agree."
        )
    decoder = read_text(text, text.values.get("model_type", "llama"))
    if outer_tie is not None:
        decoder = dataclasses.replace(decoder, tie_embeddings=outer_tie)
    # `LlavaConfig` falls back to CLIP-L/336 only where there is no vision_config at all.
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    tower = read_vision(vision, **({} if vision.values else large | {"image_size": 336, "patch_size": 14}))
    select = fields.take("vision_feature_select_strategy", str, "default")
    if select not in _FEATURES:
        fields.must_be("vision_feature_select_strategy", *_FEATURES)
    config = _checked(
        fields,
        LlavaConfig,
        vision=tower,
        text=decoder,
        projector="mlp2x_gelu",
        select_layer=fields.take("vision_feature_layer", int, -2),
        select_feature=_FEATURES[select],
        image_newline=is_next,
    )
    for part in (text, vision, fields):
        part.done()
    return config


def read_original(fields: Fields, vision: VisionConfig) -> LlavaConfig:
    """The original's config, which names its tower and says nothing of that tower's shape."""
    kind = str(fields.values["model_type"])
    text = read_text(fields, "mistral" if "mistral" in kind else "llama")
    for name in ("mm_resampler_type", "s2", "add_faster_video", "use_pos_skipping", "quantization_config"):
        fields.must_be(name, False, "None")
    if fields.take("mm_hidden_size", int, vision.embed_dim) != vision.embed_dim:
        raise CheckpointError(
            f"{fields.where}: mm_hidden_size={fields.values['mm_hidden_size']} must be the width of the tower, "
            f"{vision.embed_dim}. Give the tower that mm_vision_tower names."
        )
    fields.ignore(
        "mm_vision_tower", "mm_use_im_start_end", "mm_use_im_patch_token", "mm_projector_lr", "mm_vision_tower_lr",
        "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "unfreeze_mm_vision_tower", "use_mm_proj",
        "tokenizer_model_max_length", "tokenizer_padding_side", "image_aspect_ratio", "image_grid_pinpoints",
        "image_crop_resolution", "image_split_resolution", "mm_tunable_parts", "vision_tower_pretrained",
        "mm_spatial_pool_stride", "mm_spatial_pool_mode", "mm_spatial_pool_out_channels", "mm_newline_position",
        "pos_skipping_range", "faster_token_stride", "add_time_instruction", "force_sample", "delay_load",
        "freeze_mm_vision_resampler", "tune_mm_vision_resampler", "pretrain_mm_mlp_adapter", "hidden_size_mm",
        "mm_vision_sampler_lr",
    )  # fmt: skip
    config = _checked(
        fields,
        LlavaConfig,
        vision=vision,
        text=text,
        projector=fields.take("mm_projector_type", str, "linear"),
        select_layer=fields.take("mm_vision_select_layer", int, -2),
        select_feature=fields.take("mm_vision_select_feature", str, "patch"),
        image_newline="unpad" in fields.take("mm_patch_merge_type", str, "flat"),
    )
    fields.done()
    return config


def special_tokens(fields: Fields) -> SpecialTokens:
    """The ids that a config states, wherever its version puts them."""
    text = fields.values.get("text_config") or {}

    def find(name: str) -> Any:
        value = fields.values.get(name)
        return text.get(name) if value is None and isinstance(text, dict) else value

    def find_id(name: str) -> int | None:
        value = find(name)
        if value is not None and type(value) is not int:
            raise CheckpointError(f"{fields.where}: {name} must be a token id; got {value!r:.80}. Mend it.")
        return value

    eos_id = find("eos_token_id")
    if isinstance(eos_id, list) and all(type(value) is int for value in eos_id):
        eos_id = tuple(eos_id)
    else:
        eos_id = find_id("eos_token_id")
    image_id = find_id("image_token_index")
    return SpecialTokens(
        bos_id=find_id("bos_token_id"),
        eos_id=eos_id,
        pad_id=find_id("pad_token_id"),
        image_id=find_id("image_token_id") if image_id is None else image_id,
    )


def text_fields(config: TextConfig) -> dict[str, Any]:
    """A decoder as transformers' fields, in the words of version 4 and of version 5."""
    rope: dict[str, Any] = {}
    match config.rope_scaling:
        case LinearScaling(factor=factor):
            rope = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            rope = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_positions,
            }
    fields = {
        "model_type": "llama" if config.sliding_window is None else "mistral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope or None,
        "rope_parameters": {"rope_type": "default", **rope, "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
    }
    if config.sliding_window is None:
        return fields | {"attention_bias": False, "mlp_bias": False}
    return fields | {"sliding_window": config.sliding_window}


def vision_fields(config: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
        "attention_dropout": 0.0,
    }


def token_fields(tokens: SpecialTokens) -> dict[str, Any]:
    eos_id = list(tokens.eos_id) if isinstance(tokens.eos_id, tuple) else tokens.eos_id
    return {"bos_token_id": tokens.bos_id, "eos_token_id": eos_id, "pad_token_id": tokens.pad_id}


def _checked(fields: Fields, cls: type, **values: Any) -> Any:
    """The shape of these values; what it refuses is told with the file it came from."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{fields.where}: {error}") from error
