"""Names and memory layouts of Hugging Face checkpoints, as one table."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from llava_jax.errors import CheckpointError

# same: as it is; matrix: torch keeps (out, in), we keep (in, out); patches: a convolution's (out, 3, p, p) becomes
# (p * p * 3, out), the order in which `ClipTower` flattens a patch.
Kind = Literal["same", "matrix", "patches"]


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
    (r"model\.", "decoder."),
    # A vision tower that transformers 5 saved alone.
    (r"(?=embeddings\.(class|patch|position)_embedding|pre_layrnorm|encoder\.layers|post_layernorm)", "tower."),
    (r"(?=logit_scale|visual_projection|text_projection)", ""),
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
    Rule(r"logit_scale", "logit_scale", "same"),
)

# The original numbers the projector's `nn.Sequential`, activations included: 0, 2, 4, ...
_SEQUENTIAL = re.compile(r"projector\.(\d+)\.(weight|bias)")
# Buffers that the shapes already say; they are no parameters.
_BUFFERS = re.compile(r".*\.(inv_freq|position_ids)")


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


def from_huggingface(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters of a state dict; every key is used exactly once.

    Raises:
      CheckpointError: names the keys that no rule knows, or that two rules claim for one parameter.
    """
    values: dict[str, np.ndarray] = {}
    unknown: list[str] = []
    for theirs, value in tensors.items():
        if _BUFFERS.fullmatch(theirs):
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


def change_layout(value: np.ndarray, kind: Kind) -> np.ndarray:
    """One tensor of theirs in our memory layout."""
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
