"""From a checkpoint's files straight into arrays on devices."""

from typing import Any

import jax
import numpy as np


def place(value: Any, dtype: jax.typing.DTypeLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """A parameter as an array of a sharding.

    Every process reads only the part that its own devices hold; of a tensor in a file, only those bytes.
    """

    def read(index: Any) -> np.ndarray:
        return np.asarray(value[index]).astype(dtype)

    return jax.make_array_from_callback(tuple(value.shape), sharding, read)
