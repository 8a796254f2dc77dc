"""Layers that all networks share; a run of equal layers, held as a tuple or as one stack, and the walk through it."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

Carry = TypeVar("Carry")
# Wraps the step of a layer, usually functools.partial(jax.checkpoint, policy=...); None saves every activation.
Remat = Callable[[Callable], Callable] | None


class Linear(nnx.Linear):
    """A linear layer, except where its kernel is quantized or adapted; computes in the dtype of `x` and the kernel.

    Training holds biases in float32 beside kernels in bfloat16 (see `cast` of train/step.py).
    """

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes f"]:
        # Tokens on one axis: the kernel's gradient sums over two only after XLA has copied its operands, on CPUs.
        product = (x.reshape(-1, x.shape[-1]) @ self.kernel[...]).reshape(*x.shape[:-1], self.out_features)
        return product if self.bias is None else (product + self.bias[...]).astype(product.dtype)


class LayerNorm(nnx.LayerNorm):
    """`torch.nn.LayerNorm`, in float32 within; scale and bias may be float32 beside a bfloat16 `x`."""

    def __init__(self, dim: int, eps: float, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        # The fast variance, E[x^2] - E[x]^2, loses half the digits; parity with torch needs the slow one.
        super().__init__(dim, epsilon=eps, use_fast_variance=False, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        return super().__call__(x).astype(x.dtype)


class Embed(nnx.Embed):
    """A table of vectors, looked up by number, in the dtype that it is bound in."""

    def __call__(self, ids: Int[Array | np.ndarray, "*axes"]) -> Float[Array, "*axes d"]:
        return _look_up(self.embedding[...], ids)


@jax.custom_vjp
def _look_up(table: Float[Array, "v d"], ids: Int[Array | np.ndarray, "*axes"]) -> Float[Array, "*axes d"]:
    return jnp.take(table, ids, axis=0)


def _look_up_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return _look_up(table, ids), (table, ids)


def _look_up_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    table, ids = saved
    sums = functools.partial(jax.lax.platform_dependent, cuda=_sums_by_products, default=_sums_by_scatter)
    return sums(table, ids.ravel(), gradient.reshape(-1, table.shape[1])), None


def _sums_by_scatter(
    table: Float[Array, "v d"], ids: Int[Array, " n"], gradient: Float[Array, "n d"]
) -> Float[Array, "v d"]:
    """The gradients of each vector's uses, added up: in float32, since a sum of ones in bfloat16 stops at 256."""
    sums = jnp.zeros(table.shape, jnp.float32).at[ids].add(gradient.astype(jnp.float32), mode="drop")
    return sums.astype(table.dtype)


def _sums_by_products(
    table: Float[Array, "v d"], ids: Int[Array, " n"], gradient: Float[Array, "n d"]
) -> Float[Array, "v d"]:
    """The same, with ids as columns of ones, an eighth of the table at a time.

    Where sums must have a fixed order, XLA's compiler for GPUs sorts all values of a scatter first.
    """
    chunk = -(-len(table) // 8)

    def sums(first: Int[Array, ""]) -> Float[Array, "c d"]:
        is_used = first + jnp.arange(chunk)[:, None] == ids
        product = jnp.matmul(is_used.astype(gradient.dtype), gradient, preferred_element_type=jnp.float32)
        return product.astype(table.dtype)

    chunks = jax.lax.map(sums, jnp.arange(8) * chunk)
    return chunks.reshape(-1, table.shape[1])[: len(table)]


_look_up.defvjp(_look_up_forward, _look_up_backward)


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
