"""Linear layers; a run of equal layers, held as a tuple or as one stack, and the walk through it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Arrays = TypeVar("Arrays", bound=tuple[Any, ...])
Carry = TypeVar("Carry")
# Wraps the step of a layer, usually functools.partial(jax.checkpoint, policy=...); None saves every activation.
Remat = Callable[[Callable], Callable] | None


def as_held(arrays: Arrays, /, *, dtype: Any = None, inexact: bool = True) -> Arrays:
    """For nnx.Embed's `promote_dtype`: the table stays in the dtype it is bound in, not the one it was made with."""
    del dtype, inexact
    return arrays


def _dot_tokens(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **settings: Any) -> jax.Array:
    """For nnx.Linear's `dot_general`: a product over the last axis of `x`, its other axes merged into one.

    The kernel's gradient then sums over one axis; over two, XLA copies operands first on CPUs.
    """
    del dimension_numbers
    product = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **settings)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


# Every linear layer of the networks, except where its kernel is quantized or adapted.
Linear = functools.partial(nnx.Linear, dot_general=_dot_tokens)


def make_layers(make: Callable[[], nnx.Module], num_layers: int, *, stacked: bool) -> nnx.List | nnx.Module:
    """Builds a run of layers as an `nnx.List`, or as one module to be bound to stacked parameters.

    A tuple compiles to straight code, which decodes fast and suits GPUs; a stack compiles one layer for all of
    them (`lax.scan`), which suits TPUs and compile time. `parameters.stack_layers` makes the arrays of the one
    from those of the other.
    """
    return make() if stacked else nnx.List([make() for _ in range(num_layers)])


def run_layers(
    layers: nnx.List | nnx.Module,
    carry: Carry,
    step: Callable[[Any, Carry], Carry],
    *,
    depth: int | None = None,
    remat: Remat = None,
) -> Carry:
    """Applies `step(layer, carry)` through the first `depth` layers (all of them by default)."""
    wrapped = step if remat is None else remat(step)
    if isinstance(layers, nnx.List):
        for layer in list(layers)[:depth]:
            carry = wrapped(layer, carry)
        return carry

    graphdef, stack = nnx.split(layers)
    if depth is not None:
        stack = jax.tree.map(lambda leaf: leaf[:depth], stack)

    def body(carry: Carry, layer: nnx.State) -> tuple[Carry, None]:
        return wrapped(nnx.merge(graphdef, layer), carry), None

    return jax.lax.scan(body, carry, stack)[0]
