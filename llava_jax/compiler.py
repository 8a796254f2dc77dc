"""Options of XLA that suit a device, and the precision of products."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

# XLA's own products and sums on CPUs, not YNNPACK's: they are faster for the few rows of a step of decoding and for the
# many of a step of training (docs/performance.md), and YNNPACK's largest of values with a NaN may be a number.
WITHOUT_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": ""}
# Weights are gathered while products that do not need them are computed. XLA does so by itself on v5e, but not on
# v4, v5p and v6e, whose devices would compute nothing meanwhile (docs/performance.md).
ASYNC_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# Sums over vectors of numbers, where XLA would otherwise add one number after another on CPUs, or in windows of a few,
# and vectors of 512 bits where the processor has them. Products and sums of infinities and NaN stay what they are,
# divisions and functions as exact; only what cancels out may lose them: `x - x` becomes 0. No sum may be in bfloat16
# itself: without windows it would soon stop growing.
IN_ANY_ORDER = {
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_nans": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
    "xla_cpu_prefer_vector_width": 512,
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
}
OPTIONS = {"cpu": WITHOUT_YNNPACK, "tpu": ASYNC_GATHERS}


@functools.cache
def compiler_options(device: Any, *, in_any_order: bool = False) -> dict[str, Any] | None:
    """What to give to `jax.jit` for programs that compute much; None is what XLA does by itself.

    `device` is one of those that the program is compiled for, here or not. With `in_any_order`, CPUs add over vectors,
    as GPUs and TPUs do anyway: generating needs it, a step of training gains little.
    """
    wanted: list[dict[str, Any]] = [OPTIONS.get(device.platform, {})]
    if in_any_order and device.platform == "cpu":
        wanted.append(IN_ANY_ORDER)
    found: dict[str, Any] = {}
    for options in wanted:
        if options and _are_known(options, device):
            found |= options
    return found or None


@contextlib.contextmanager
def products_in(dtype: jax.typing.DTypeLike) -> Iterator[None]:
    """What is traced inside, or by a function that this decorates, multiplies float32 in float32 if that is the dtype.

    By default GPUs round the operands to TensorFloat-32, and TPUs to bfloat16.
    """
    with jax.default_matmul_precision("float32") if jnp.dtype(dtype) == jnp.float32 else contextlib.nullcontext():
        yield


def _are_known(options: dict[str, Any], device: Any) -> bool:
    """Whether this version of the device's compiler has the options."""
    # A process compiles for its own devices, not for another's.
    place = None if device.platform == jax.default_backend() else SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        # Anything else may be one process's trouble, and all must compile the same program.
        if "No such compile option" not in str(error):
            raise
        return False
    return True
