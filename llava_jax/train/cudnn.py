"""Attention on NVIDIA GPUs from Hopper on: cuDNN's flash kernel, each record of a packed row a sequence of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.models.attention import Attend, Scope, attend_xla
from llava_jax.train.sharding import BATCH_AXES

# Hopper; kernels for older GPUs take no packed rows.
CAPABILITY = 9.0
# What JAX calls the kernel, whose results a remat policy may keep (`step.REMAT`).
KERNEL = "dot_product_attention_fwd"
# Largest difference from plain attention that rounding to bfloat16 explains, as a share of the largest value.
TOLERANCE = 0.03


def make_cudnn(mesh: Mesh, most_records: int) -> Attend:
    """cuDNN's attention for bfloat16: causal packed rows of at most `most_records` records, and calls that see all.

    Other calls go to plain XLA. The kernel is given slots for positions, as on TPUs (`make_splash`). JAX documents
    it for whole sequences only, and its public function would let packed records see each other; the kernel behind it
    takes where each record begins and how long it is (jax PR 25812).
    """

    def attend(
        q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], v: Float[Array, "b s k h"], scope: Scope
    ) -> Float[Array, "b t n h"]:
        segments, heads = scope.query_segments, "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        spec = P(BATCH_AXES, None, heads, None)
        share = functools.partial(jax.shard_map, mesh=mesh, out_specs=spec, check_vma=False)
        if q.dtype != jnp.bfloat16 or scope.window is not None:
            return attend_xla(q, k, v, scope)
        if segments is None and not scope.causal:
            return share(_call, in_specs=(spec, spec, spec))(q, k, v)
        if segments is not None and segments is scope.key_segments and scope.causal:
            run = functools.partial(_attend_packed, most_runs=most_records + 1)
            return share(run, in_specs=(spec, spec, spec, P(BATCH_AXES, None)))(q, k, v, segments)
        return attend_xla(q, k, v, scope)

    return attend


def find_runs(segment_ids: Int[Array, "b t"], most: int) -> tuple[Int[Array, "b m"], Int[Array, "b _"]]:
    """Lengths of the runs of equal ids, `most` of them, and where each begins, one more; -1 where there is none.

    Padding is a run like any other: what the kernel does not visit, it leaves unwritten.

    Example, most=3:   [1, 1, 1, 2, 0, 0]   ->   lengths [3, 1, 2], starts [0, 3, 4, -1]
    """
    is_first = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    run = jnp.cumsum(is_first, axis=1) - 1
    lengths = (run[:, :, None] == jnp.arange(most)).sum(axis=1, dtype=jnp.int32)
    starts = jnp.cumsum(lengths, axis=1) - lengths
    is_there = lengths > 0
    return jnp.where(is_there, lengths, -1), jnp.pad(
        jnp.where(is_there, starts, -1), [(0, 0), (0, 1)], constant_values=-1
    )


def _attend_packed(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    segment_ids: Int[Array, "b t"],
    *,
    most_runs: int,
) -> Float[Array, "b t n h"]:
    lengths, starts = find_runs(segment_ids, most_runs)
    runs = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": starts, "kv_offsets": starts}
    return _call(q, k, v, mask="PADDING_CAUSAL", **runs)


def _call(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    mask: str = "NO_MASK",
    **runs: Any,
) -> Any:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    return fused.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask_type=fused.MaskType[mask], **runs)


def why_not() -> str | None:
    """What keeps a process from using this attention; found by trying it on one of its GPUs, on a packed row.

    The kernel is no public part of JAX, and cuDNN is whatever is installed, so neither is trusted unseen: a kernel
    that lets one record see another would spoil a run without a word.
    """
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "", 1).isdigit() or float(capability) < CAPABILITY:
        return f"{device.device_kind} is no NVIDIA GPU from Hopper on"
    try:
        with jax.default_device(device):
            error = _largest_error()
    except Exception as reason:  # Whatever a private function of another version, or a driver, comes up with.
        return f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else 'no message'}"
    return None if error <= TOLERANCE else f"it differs from plain attention by {error:.3g}, more than {TOLERANCE}"


def _largest_error() -> float:
    """How far the kernel's results and gradients are from plain attention's, on rows of several records and padding."""
    rng = np.random.default_rng(0)
    t, n, h = 512, 4, 128
    q, k, v, weights = (jnp.asarray(rng.standard_normal((2, t, n, h)), jnp.bfloat16) for _ in range(4))
    lengths = ((200, 100, 150, 62), (512, 0, 0, 0))
    ids = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], row) for row in lengths]).astype(np.int32))
    positions = jnp.broadcast_to(jnp.arange(t), ids.shape)
    scope = Scope(ids, ids, positions, positions, causal=True)

    def both(run: Any) -> Any:
        def total(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            mixed = run(q, k, v)
            return (mixed * weights).astype(jnp.float32).sum(), mixed

        return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)

    kernel = both(lambda q, k, v: _attend_packed(q, k, v, ids, most_runs=8))
    plain = both(lambda q, k, v: attend_xla(q, k, v, scope))
    pairs = zip(*(map(jnp.float32, jax.tree.leaves(found)) for found in (kernel, plain)), strict=True)
    # Infinite where a value is not finite: the largest of values with a NaN is not NaN on every device.
    errors = [jnp.where(jnp.isfinite(a).all(), jnp.abs(a - b).max() / jnp.abs(b).max(), jnp.inf) for a, b in pairs]
    return float(jnp.stack(errors).max())
