"""Cross entropy of the supervised tokens of each row; the head is paid for them alone, and its logits once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from llava_jax.train.sharding import BATCH_AXES, num_batch_shards

# A row's logits exist a quarter of its slots at a time, but not fewer than these; the whole [b t v] never does.
LEAST_CHUNK = 128
# `cross_entropy`, its mesh bound.
CrossEntropy = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


def chunk_length(t: int) -> int:
    """How many slots of each row are worked on at a time."""
    return min(t, max(LEAST_CHUNK, -(-t // 4)))


def cross_entropy(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    is_target: Bool[Array, "b t"],
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed float32 cross entropy of the supervised tokens, and how many of them have the largest logit.

    A row's supervised slots come first, and chunks without any are skipped: answers are often half of a row or less.
    The gradient is made with the loss, from the same logits, so nothing is computed again for it (as in Liger's fused
    linear cross entropy, arXiv 2410.10989, section 3.2).

    On a mesh every device walks through its own rows, with the head gathered once before and the head's gradient
    added up once after; left to itself, XLA does both for every chunk.
    """
    chunk = chunk_length(hidden.shape[1])
    short = -hidden.shape[1] % chunk
    order = jnp.argsort(~is_target, axis=1, stable=True)

    def chunks(x: Array) -> Array:
        b, t, *rest = x.shape
        ordered = jax.vmap(lambda row, at: row.at[at].get(unique_indices=True, mode="promise_in_bounds"))(x, order)
        padded = jnp.pad(ordered, [(0, 0), (0, short)] + [(0, 0)] * len(rest))
        # The slots of all rows on one axis; see `Linear` of models/layers.py.
        return padded.reshape(b, -1, chunk, *rest).swapaxes(0, 1).reshape(-1, b * chunk, *rest)

    return _sum_chunks(mesh, chunks(hidden), head, chunks(targets), chunks(is_target))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(
    mesh: Mesh | None,
    hidden: Float[Array, "n m d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "n m"],
    is_target: Bool[Array, "n m"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return _everywhere(mesh, hidden, head, targets, is_target, for_hidden=False, for_head=False)[0]


def _forward(mesh: Mesh | None, hidden: Any, head: Any, targets: Any, is_target: Any) -> tuple[Any, Any]:
    arrays = (hidden.value, head.value, targets.value, is_target.value)
    return _everywhere(mesh, *arrays, for_hidden=hidden.perturbed, for_head=head.perturbed)


def _backward(
    mesh: Mesh | None, gradients: tuple[Array | None, Array | None], outer: tuple[Any, Any]
) -> tuple[Any, Any, None, None]:
    del mesh
    if isinstance(outer[0], jax.custom_derivatives.SymbolicZero):
        outer = (jnp.zeros(()), None)
    by_hidden, by_head = (None if x is None else (outer[0] * x).astype(x.dtype) for x in gradients)
    return by_hidden, by_head, None, None


_sum_chunks.defvjp(_forward, _backward, symbolic_zeros=True)


def _everywhere(
    mesh: Mesh | None,
    hidden: Float[Array, "n m d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "n m"],
    is_target: Bool[Array, "n m"],
    *,
    for_hidden: bool,
    for_head: bool,
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
    """Loss and right answers, and the loss's derivatives by what asks for one; summed over all devices' rows."""
    walk = functools.partial(_walk, for_hidden=for_hidden, for_head=for_head)
    scatter = functools.partial(jax.lax.psum_scatter, axis_name="fsdp", scatter_dimension=0, tiled=True)
    if mesh is not None and mesh.shape["tensor"] > 1:
        # Said of `tensor`, too: else the compiler gathers the derivative along it first.
        whole = P(None, "tensor")
        scatter = jax.shard_map(scatter, in_specs=whole, out_specs=whole, axis_names={"tensor"}, check_vma=False)

    def own(*arrays: Array) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
        totals, (by_hidden, by_head) = walk(*arrays)
        if by_head is not None:
            by_head = jax.lax.psum(scatter(by_head), "data")
        return jax.lax.psum(totals, BATCH_AXES), (by_hidden, by_head)

    rows = P(None, BATCH_AXES)
    run = walk
    if mesh is not None and num_batch_shards(mesh) > 1:
        # What a device adds up is its own until the end, so that check is off. `tensor` stays the compiler's.
        run = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(rows, P(), rows, rows, P()),
            out_specs=(P(), (rows, P("fsdp"))),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )
    # Devices skip the same chunks: those of `tensor` exchange something in each.
    totals, (by_hidden, by_head) = run(hidden, head, targets, is_target, is_target.any(axis=1))
    by_head = by_head if by_head is None else by_head.astype(head.dtype)
    # Together: else devices may keep their own float32 sums through the whole backward pass, to add them up last.
    return totals, jax.lax.optimization_barrier((by_hidden, by_head))


def _walk(
    hidden: Float[Array, "n m d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "n m"],
    is_target: Bool[Array, "n m"],
    has_target: Bool[Array, " n"],
    *,
    for_hidden: bool,
    for_head: bool,
) -> tuple[tuple[Array, Array], tuple[Array | None, Array | None]]:
    """The same sums over these rows; the head's derivative stays in float32, to be added to others."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def look(totals: tuple[Any, Any, Any], hidden_md, targets_m, is_target_m):
        loss, right, by_head = totals
        logits = dot("md,dv->mv", hidden_md, head)
        largest = logits.max(axis=-1, keepdims=True)
        powers = jnp.exp(logits - largest)
        mass = powers.sum(axis=-1, keepdims=True)
        is_picked = jnp.arange(head.shape[1]) == targets_m[..., None]
        picked = jnp.where(is_picked, logits, 0.0).sum(axis=-1)
        losses = jnp.log(mass[..., 0]) + largest[..., 0] - picked
        loss += jnp.where(is_target_m, losses, 0.0).sum()
        right += ((picked >= largest[..., 0]) & is_target_m).sum(dtype=jnp.float32)
        by_logits = jnp.where(is_target_m[..., None], powers / mass - is_picked, 0.0).astype(hidden.dtype)
        by_hidden = dot("mv,dv->md", by_logits, head).astype(hidden.dtype) if for_hidden else None
        if for_head:
            by_head += dot("md,mv->dv", hidden_md, by_logits)
        return (loss, right, by_head), by_hidden

    def skip(totals: tuple[Any, Any, Any], hidden_md, targets_m, is_target_m):
        del targets_m, is_target_m
        return totals, jnp.zeros_like(hidden_md) if for_hidden else None

    def body(totals: tuple[Any, Any, Any], chunk: tuple[Array, ...]):
        *arrays, is_needed = chunk
        return jax.lax.cond(is_needed, look, skip, totals, *arrays)

    zeros = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(head.shape) if for_head else None)
    (loss, right, by_head), by_hidden = jax.lax.scan(body, zeros, (hidden, targets, is_target, has_target))
    return (loss, right), (by_hidden, by_head)
