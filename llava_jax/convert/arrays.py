"""From a checkpoint's files straight into arrays on devices."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.errors import CheckpointError
from llava_jax.models.parameters import Parameters
from llava_jax.models.quantized import ABSMAX, CODES, quantize


def place_all(values: Mapping[str, Any], targets: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Parameters in the dtypes and shardings of `targets`; a kernel whose codes are wanted is quantized on the way.

    One kernel at a time, so that no more than one is ever whole.
    """
    placed: Parameters = {}
    for name, target in targets.items():
        if name.endswith(CODES):
            stem = name.removesuffix(CODES)
            halves = (target, targets[stem + ABSMAX])
            placed[name], placed[stem + ABSMAX] = _place_quantized(f"{stem}.kernel", values, halves)
        elif not name.endswith(ABSMAX):
            placed[name] = place(values[name], target.dtype, target.sharding)
    return placed


def place(value: Any, dtype: jax.typing.DTypeLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """A parameter as an array of a sharding.

    Every process reads only the part that its own devices hold; of a tensor in a file, only those bytes.
    """

    def read(index: Any) -> np.ndarray:
        return np.asarray(value[index]).astype(dtype)

    return jax.make_array_from_callback(tuple(value.shape), sharding, read)


def _place_quantized(
    name: str, values: Mapping[str, Any], targets: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
) -> tuple[jax.Array, jax.Array]:
    """A kernel's codes and scales, computed from the values as they are in the file, where the codes will lie."""
    codes, absmax = targets
    kernel = place(values[name], values[name].dtype, codes.sharding)
    scheme = "int8" if codes.dtype == np.int8 else "nf4"
    compiled = jax.jit(quantize, static_argnums=1, out_shardings=(codes.sharding, absmax.sharding))
    # Asked of the kernel: a largest magnitude may leave out what is no number.
    if not jnp.isfinite(kernel).all():
        raise CheckpointError(f"Only finite weights can be quantized; {name} has others. Load it without quantizing.")
    # Waited for, or kernels would queue up faster than they are quantized.
    return jax.block_until_ready(compiled(kernel, scheme))
