"""Accounting for a checkpoint: every tensor against the shape of its config, each problem by name."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llava_jax.convert.fields import Fields
from llava_jax.convert.layouts import is_buffer, their_name
from llava_jax.convert.tensor import Tensor
from llava_jax.convert.vocabulary import EMBEDDING, HEAD
from llava_jax.errors import CheckpointError
from llava_jax.models.build import structure
from llava_jax.models.parameters import part
from llava_jax.shapes import ClipConfig, LlavaConfig, ModelConfig, TextConfig, VisionConfig
from llava_jax.sizes import CLIP_L_336


@functools.lru_cache(maxsize=4)
def expected_parameters(model: ModelConfig | TextConfig | VisionConfig) -> dict[str, Any]:
    """The abstract parameters of a model, or of the part of a LLaVA that a shape stands for."""
    if isinstance(model, LlavaConfig | ClipConfig):
        return structure(model)[1]
    name = "decoder" if isinstance(model, TextConfig) else "tower"
    whole = LlavaConfig(
        vision=model if isinstance(model, VisionConfig) else CLIP_L_336,
        text=model if isinstance(model, TextConfig) else _ANY_TEXT,
        projector="linear",
        select_layer=-1,
        select_feature="patch",
        image_newline=False,
    )
    return {key: value for key, value in structure(whole)[1].items() if part(key) == name}


_ANY_TEXT = TextConfig(
    vocab_size=1,
    num_layers=1,
    embed_dim=2,
    hidden_dim=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    rope_theta=10_000.0,
    rope_scaling=None,
    norm_eps=1e-5,
    max_positions=1,
    tie_embeddings=True,
    sliding_window=None,
)


def settle(model: Any, params: dict[str, Tensor], source: str, notes: list[str]) -> dict[str, Tensor]:
    """The parameters, each accounted for against the shape; a copy of a tied head is checked and dropped.

    Raises:
      CheckpointError: names what is missing, unexpected, misshapen, or tied and yet different.
    """
    text = model.text if isinstance(model, LlavaConfig) else model
    if isinstance(text, TextConfig) and text.tie_embeddings and HEAD in params and EMBEDDING in params:
        head, embedding = params[HEAD], params[EMBEDDING]
        if head.shape[::-1] != embedding.shape or not np.array_equal(head.view().T, embedding.view()):
            raise CheckpointError(
                f"{head.origin} must equal {embedding.origin}, since tie_word_embeddings is true; it does not. "
                "Mend config.json."
            )
        params = {name: value for name, value in params.items() if name != HEAD}
        notes.append("lm_head equals the embedding that it is tied to, and is not kept twice")
    if isinstance(model, VisionConfig) and any(part(name) in ("caption", "text_projection") for name in params):
        params = {name: value for name, value in params.items() if part(name) == "tower"}
    expected = expected_parameters(model)
    problems = [f"missing {_name(name, model)}" for name in sorted(set(expected) - set(params))]
    problems += [f"unexpected {params[name].origin}" for name in sorted(set(params) - set(expected))]
    problems += [
        f"{params[name].origin} is {params[name].shape} here, must be {tuple(expected[name].shape)}"
        for name in sorted(set(params) & set(expected))
        if params[name].shape != tuple(expected[name].shape)
    ]
    problems += [
        f"{tensor.origin} is {tensor.dtype}, which holds no weights"
        for _, tensor in sorted(params.items())
        if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{source} does not hold the model of its config: {shown}. Download it again.")
    return params


def _name(ours: str, model: Any) -> str:
    """A key as a checkpoint would have it, and ours."""
    if isinstance(model, ClipConfig):
        return ours
    projector = model.projector if isinstance(model, LlavaConfig) else "linear"
    return f"{their_name(ours, 'original', projector=projector)} ({ours})"


def check_buffers(tensors: Mapping[str, Tensor], fields: Fields) -> list[str]:
    """Checks the values that a shape already says, and tells that they are not kept."""
    notes = []
    for key in sorted(filter(is_buffer, tensors)):
        value = np.asarray(tensors[key].view())
        if key.endswith("position_ids"):
            wanted = np.arange(value.size).reshape(value.shape)
        else:
            theta = fields.values.get("rope_theta") or 10_000.0
            wanted = 1.0 / float(theta) ** (np.arange(value.size) / value.size).reshape(value.shape)
        tolerance = {2: 5e-3}.get(value.dtype.itemsize, 1e-5)
        if not np.allclose(value.astype(np.float64), wanted, rtol=tolerance, atol=0):
            raise CheckpointError(f"{tensors[key].origin} holds other values than its config says. Mend config.json.")
        notes.append(key)
    return [f"checked and left out {len(notes)} buffers: {', '.join(notes[:4])}{', ...' * (len(notes) > 4)}"] * bool(
        notes
    )
