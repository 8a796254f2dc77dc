"""Names and memory layouts of the checkpoints of others, as tables: theirs to ours, and ours to theirs."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from llava_jax.convert.tensor import Tensor
from llava_jax.errors import CheckpointError
from llava_jax.shapes import LlavaConfig

# same: as it is; matrix: torch keeps (out, in), we keep (in, out); patches: a convolution's (out, 3, p, p) becomes
# (p * p * 3, out), the order in which `ClipTower` flattens a patch.
Kind = Literal["same", "matrix", "patches"]


Array = TypeVar("Array", np.ndarray, Tensor)


class Rule(NamedTuple):
    theirs: str
    ours: str
    kind: Kind


# Prefixes of the parts by checkpoint family; longest first, so that the first match is the right one.
# llava: L1 and L2 of the hub and the original's own; llama: also Mistral and Vicuna; clip: whole or vision only.
PREFIXES: tuple[tuple[str, str], ...] = (
    (r"language_model\.model\.|model\.language_model\.", "decoder."),
    (r"language_model\.lm_head\.|lm_head\.", "decoder.lm_head."),
    (r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?|vision_model\.", "tower."),
    (r"(model\.)?multi_modal_projector\.linear_", "projector.linear_"),
    (r"model\.mm_projector\.", "projector."),
    (r"text_model\.", "caption."),
    (r"model\.(?=image_newline)", ""),
    (r"model\.", "decoder."),
    # A vision tower that transformers 5 saved alone.
    (r"(?=embeddings\.(class|patch|position)_embedding|pre_layrnorm|encoder\.layers|post_layernorm)", "tower."),
    (r"(?=logit_scale|visual_projection|text_projection|image_newline)", ""),
)

# After the prefix. Numbers of layers are the same on both sides.
RULES: tuple[Rule, ...] = (
    Rule(r"decoder\.embed_tokens\.weight", "decoder.embed_tokens.embedding", "same"),
    Rule(r"decoder\.lm_head\.weight", "decoder.lm_head.kernel", "matrix"),
    Rule(r"decoder\.norm\.weight", "decoder.norm.scale", "same"),
    Rule(r"decoder\.layers\.(\d+)\.(\w+_layernorm)\.weight", r"decoder.layers.\1.\2.scale", "same"),
    Rule(r"decoder\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.weight", r"decoder.layers.\1.\2.\3.kernel", "matrix"),
    Rule(r"projector\.linear_1\.weight", "projector.linear.0.kernel", "matrix"),
    Rule(r"projector\.linear_1\.bias", "projector.linear.0.bias", "same"),
    Rule(r"projector\.linear_2\.weight", "projector.linear.1.kernel", "matrix"),
    Rule(r"projector\.linear_2\.bias", "projector.linear.1.bias", "same"),
    Rule(r"projector\.weight", "projector.linear.0.kernel", "matrix"),
    Rule(r"projector\.bias", "projector.linear.0.bias", "same"),
    Rule(r"tower\.embeddings\.class_embedding", "tower.class_embedding", "same"),
    Rule(r"tower\.embeddings\.patch_embedding\.weight", "tower.patch_embedding.kernel", "patches"),
    Rule(r"(tower|caption)\.embeddings\.position_embedding\.weight", r"\1.position_embedding", "same"),
    Rule(r"caption\.embeddings\.token_embedding\.weight", "caption.token_embedding.embedding", "same"),
    # "pre_layrnorm" is how the checkpoints spell it.
    Rule(r"tower\.pre_layrnorm\.weight", "tower.pre_layernorm.scale", "same"),
    Rule(r"tower\.pre_layrnorm\.bias", "tower.pre_layernorm.bias", "same"),
    Rule(r"(tower\.post_layernorm|caption\.final_layer_norm)\.weight", r"\1.scale", "same"),
    Rule(r"(tower\.post_layernorm|caption\.final_layer_norm)\.bias", r"\1.bias", "same"),
    Rule(r"(tower|caption)\.encoder\.layers\.(\d+)\.(layer_norm\d)\.weight", r"\1.layers.\2.\3.scale", "same"),
    Rule(r"(tower|caption)\.encoder\.layers\.(\d+)\.(layer_norm\d)\.bias", r"\1.layers.\2.\3.bias", "same"),
    Rule(
        r"(tower|caption)\.encoder\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.weight",
        r"\1.layers.\2.\3.\4.kernel",
        "matrix",
    ),
    Rule(r"(tower|caption)\.encoder\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.bias", r"\1.layers.\2.\3.\4.bias", "same"),
    Rule(r"(visual|text)_projection\.weight", r"\1_projection.kernel", "matrix"),
    Rule(r"(logit_scale|image_newline)", r"\1", "same"),
)

# The way back, for all but the projector, whose numbers differ: ours, and theirs after the prefix of the part.
_EXPORTS: tuple[tuple[str, str], ...] = (
    (r"tower\.(class_embedding)", r"{tower}embeddings.\1"),
    (r"tower\.(patch_embedding)\.kernel", r"{tower}embeddings.\1.weight"),
    (r"tower\.(position_embedding)", r"{tower}embeddings.\1.weight"),
    (r"tower\.pre_layernorm\.(scale|bias)", r"{tower}pre_layrnorm.\1"),
    (r"tower\.(post_layernorm)\.(scale|bias)", r"{tower}\1.\2"),
    (r"tower\.(layers\..*)", r"{tower}encoder.\1"),
    (r"decoder\.(lm_head\.kernel)", r"{head}\1"),
    (r"decoder\.(.*)", r"{decoder}\1"),
    (r"(image_newline)", r"{newline}\1"),
)
# L1 is what every transformers reads; the original wraps its tower twice.
LAYOUTS: dict[str, dict[str, str]] = {
    "huggingface": {
        "tower": "vision_tower.vision_model.",
        "decoder": "language_model.model.",
        "head": "language_model.",
        "newline": "",
    },
    "original": {
        "tower": "model.vision_tower.vision_tower.vision_model.",
        "decoder": "model.",
        "head": "",
        "newline": "model.",
    },
}

# The original numbers the projector's `nn.Sequential`, activations included: 0, 2, 4, ...
_SEQUENTIAL = re.compile(r"projector\.(\d+)\.(weight|bias)")
# Buffers that the shapes already say; they are no parameters.
_BUFFERS = re.compile(r".*\.(inv_freq|position_ids)")


def is_buffer(theirs: str) -> bool:
    """Whether a key names values that the shape already says."""
    return _BUFFERS.fullmatch(theirs) is not None


def our_name(theirs: str) -> tuple[str, Kind] | None:
    """Our path of a Hugging Face key and how its memory changes; None for a key that no rule knows."""
    for pattern, prefix in PREFIXES:
        match = re.match(pattern, theirs)
        if match is not None:
            name = prefix + theirs[match.end() :]
            break
    else:
        return None
    sequential = _SEQUENTIAL.fullmatch(name)
    if sequential is not None:
        index = int(sequential[1])
        suffix, kind = ("kernel", "matrix") if sequential[2] == "weight" else ("bias", "same")
        return None if index % 2 else (f"projector.linear.{index // 2}.{suffix}", kind)
    for rule in RULES:
        match = re.fullmatch(rule.theirs, name)
        if match is not None:
            return match.expand(rule.ours), rule.kind
    return None


def from_huggingface(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Our parameters of a state dict; every key is used exactly once.

    Raises:
      CheckpointError: names the keys that no rule knows, or that two rules claim for one parameter.
    """
    values: dict[str, Array] = {}
    unknown: list[str] = []
    for theirs, value in tensors.items():
        if is_buffer(theirs):
            continue
        found = our_name(theirs)
        if found is None:
            unknown.append(theirs)
            continue
        ours, kind = found
        if ours in values:
            raise CheckpointError(f"Two tensors of the checkpoint mean {ours}; one is {theirs}. Remove one of them.")
        values[ours] = change_layout(value, kind)
    _refuse(unknown)
    return values


def their_name(ours: str, layout: str, *, projector: str) -> str:
    """The key of one of our parameters in another layout."""
    match = re.fullmatch(r"projector\.linear\.(\d+)\.(kernel|bias)", ours)
    if match is not None:
        index, leaf = int(match[1]), "weight" if match[2] == "kernel" else "bias"
        if layout == "huggingface":
            return f"multi_modal_projector.linear_{index + 1}.{leaf}"
        return f"model.mm_projector.{leaf}" if projector == "linear" else f"model.mm_projector.{2 * index}.{leaf}"
    for pattern, theirs in _EXPORTS:
        match = re.fullmatch(pattern, ours)
        if match is not None:
            name = match.expand(theirs).format(**LAYOUTS[layout])
            return re.sub(r"\.(kernel|scale|embedding)$", ".weight", name)
    raise AssertionError(f"{ours} has no name in the layout {layout}")


def to_layout(params: Mapping[str, Tensor], layout: str, model: LlavaConfig) -> dict[str, Tensor]:
    """Our parameters under the keys and in the memory layout of `huggingface` (L1) or `original`."""
    tensors = {}
    for ours, tensor in params.items():
        theirs = their_name(ours, layout, projector=model.projector)
        tensors[theirs] = restore_layout(tensor, _kind(ours), model.vision.patch_size)
    return tensors


def _kind(ours: str) -> Kind:
    if ours == "tower.patch_embedding.kernel":
        return "patches"
    return "matrix" if ours.endswith(".kernel") else "same"


def restore_layout(tensor: Tensor, kind: Kind, patch_size: int) -> Tensor:
    """The inverse of `change_layout`."""
    if kind == "matrix":
        return tensor.turned()
    if kind == "patches":
        shape = (tensor.shape[1], 3, patch_size, patch_size)
        return tensor.changed(shape, lambda v: v.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1))
    return tensor


def change_layout(value: Array, kind: Kind) -> Array:
    """One tensor of theirs in our memory layout; one that lies in a file stays there.

    Raises:
      CheckpointError: the tensor has another number of axes than its name says.
    """
    if isinstance(value, Tensor):
        if len(value.shape) != {"matrix": 2, "patches": 4}.get(kind, len(value.shape)):
            raise CheckpointError(f"{value.origin} has the shape {value.shape}, which a {kind} cannot have.")
        if kind == "matrix":
            return value.turned()
        if kind == "patches":
            shape = (math.prod(value.shape[1:]), value.shape[0])
            return dataclasses.replace(value.changed(shape, lambda v: change_layout(v, kind)), slow_axis=1)
        return value
    if kind == "matrix":
        return value.T
    if kind == "patches":
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value


def _refuse(unknown: Iterable[Any]) -> None:
    names = sorted(unknown)
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise CheckpointError(
            f"Every tensor of a checkpoint must be used; no rule knows {', '.join(names[:8])}{more}. "
            "This kind of checkpoint is not supported."
        )
