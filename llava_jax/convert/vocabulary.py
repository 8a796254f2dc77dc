"""Rows of the vocabulary: what new tokens start from."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from llava_jax.convert.fields import Fields
from llava_jax.convert.tensor import Tensor
from llava_jax.data.conversation import IM_END, IM_PATCH, IM_START
from llava_jax.errors import CheckpointError

EMBEDDING = "decoder.embed_tokens.embedding"
HEAD = "decoder.lm_head.kernel"


def added_tokens(config: Fields) -> tuple[str, ...]:
    """What a model of the original's that frames its pictures needs in its tokenizer, which may be the base's.

    The original adds what is not there as it opens the model, in this order (`load_pretrained_model`).
    """
    is_framed, has_patch = (config.values.get(f"mm_use_im_{name}") is True for name in ("start_end", "patch_token"))
    return ((IM_PATCH,) * has_patch + (IM_START, IM_END)) * is_framed


def grow_rows(rows: Float[np.ndarray, "v d"], count: int) -> Float[np.ndarray, "w d"]:
    """The rows with `count` more, each the mean of the old ones.

    `initialize_vision_tokenizer` of the original's `llava_arch.py`; transformers' converters draw from a normal
    around the mean instead, which no two runs repeat.
    """
    mean = rows.mean(axis=0, dtype=np.float64, keepdims=True).astype(rows.dtype)
    return np.concatenate([rows, np.repeat(mean, count, axis=0)])


def grow_vocabulary(params: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Parameters whose embedding and head have `size` rows.

    Raises:
      CheckpointError: they have more already.
    """
    grown = dict(params)
    for name, axis in ((EMBEDDING, 0), (HEAD, 1)):
        if name in params:
            tensor = params[name]
            more = size - tensor.shape[axis]
            if more < 0:
                raise CheckpointError(
                    f"{tensor.origin} has {tensor.shape[axis]} tokens, more than the {size} of the config. "
                    "This is not the base that belongs to it."
                )
            if more:
                shape = (size, tensor.shape[1]) if axis == 0 else (tensor.shape[0], size)
                grown[name] = tensor.changed(shape, lambda value, axis=axis, more=more: _grown(value, axis, more))
    return grown


def _grown(value: np.ndarray, axis: int, more: int) -> np.ndarray:
    return grow_rows(value, more) if axis == 0 else grow_rows(value.T, more).T
