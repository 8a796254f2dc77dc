"""From a checkpoint's files straight into arrays on devices."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.convert.tensor import Tensor
from llava_jax.errors import CheckpointError
from llava_jax.models.parameters import Parameters
from llava_jax.models.quantized import ABSMAX, CODES, TURNED_ABSMAX, TURNED_CODES, Scheme, is_quantized, quantize
from llava_jax.models.streamed import WEIGHT


def place_all(values: Mapping[str, Any], targets: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Parameters in the dtypes and shardings of `targets`; kernels are quantized or turned on the way where `targets`
    has their codes or weights.

    One kernel at a time, so that no more than one is ever whole.
    """
    placed: Parameters = {}
    for name, target in targets.items():
        if name.endswith((CODES, TURNED_CODES)):
            stem, is_turned = name.removesuffix(CODES).removesuffix(TURNED_CODES), name.endswith(TURNED_CODES)
            scales = stem + (TURNED_ABSMAX if is_turned else ABSMAX)
            halves = (target, targets[scales])
            placed[name], placed[scales] = _place_quantized(f"{stem}.kernel", values, halves, is_turned=is_turned)
        elif name.endswith(WEIGHT):
            kernel = values[name.removesuffix(WEIGHT) + ".kernel"]
            turned = kernel.turned() if isinstance(kernel, Tensor) else kernel.T
            placed[name] = place(turned, target.dtype, target.sharding)
        elif not is_quantized(name):
            placed[name] = place(values[name], target.dtype, target.sharding)
    return placed


def place(value: Any, dtype: jax.typing.DTypeLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """A parameter as an array of a sharding.

    Every process reads only the part that its own devices hold. Where that would be a piece of every row of a file,
    whose pages hold the pieces of others too, each of several processes reads as many whole rows instead, and they
    exchange the pieces.
    """

    def read(index: Any) -> np.ndarray:
        return np.asarray(value[index]).astype(dtype)

    rows = _by_rows(value, sharding) if isinstance(value, Tensor) else sharding
    array = jax.make_array_from_callback(tuple(value.shape), rows, read)
    return array if rows is sharding else _exchange(sharding)(array)


def _by_rows(tensor: Tensor, sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding over the same devices that cuts a file into as many pieces, each in one; else the sharding given."""
    if sharding.is_fully_addressable or not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    cut = [axis for axis, names in enumerate(sharding.spec) if names is not None]
    if cut in ([], [tensor.slow_axis]):
        return sharding
    names = [sharding.spec[axis] for axis in cut]
    flat = tuple(name for group in names for name in (group if isinstance(group, tuple) else (group,)))
    if tensor.shape[tensor.slow_axis] % math.prod(sharding.mesh.shape[name] for name in flat):
        return sharding
    spec = [flat if axis == tensor.slow_axis else None for axis in range(len(tensor.shape))]
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


@functools.cache
def _exchange(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=sharding)


def _place_quantized(
    name: str,
    values: Mapping[str, Any],
    targets: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct],
    *,
    is_turned: bool,
) -> tuple[jax.Array, jax.Array]:
    """A kernel's codes and scales, computed from the values as they are in the file, where the codes will lie."""
    codes, absmax = targets
    kernel = place(values[name], values[name].dtype, codes.sharding)
    scheme = "int8" if codes.dtype == np.int8 else "nf4"
    compute = _turned_codes if is_turned else quantize
    compiled = jax.jit(compute, static_argnums=1, out_shardings=(codes.sharding, absmax.sharding))
    # Asked of the kernel: a largest magnitude may leave out what is no number.
    if not jnp.isfinite(kernel).all():
        raise CheckpointError(f"Only finite weights can be quantized; {name} has others. Load it without quantizing.")
    # Waited for, or kernels would queue up faster than they are quantized.
    return jax.block_until_ready(compiled(kernel, scheme))


def _turned_codes(kernel: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    codes, absmax = quantize(kernel, scheme)
    return codes.T, absmax.T
