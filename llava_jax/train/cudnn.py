"""Attention on NVIDIA GPUs from Hopper on: cuDNN's flash kernel, each record of a packed row a sequence of its own."""

import contextlib
import functools
from collections.abc import Iterator
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
# What cuDNN takes: heads of this width at most, and places that an int32 can count.
WIDEST_HEAD = 128
MOST_PLACES = 2**31
# Bytes that a packed call's backward pass may sum the queries' gradients in, T / 256 times as many with deterministic
# operations; never less than one row takes.
WORKSPACE = 2**29
# What JAX calls the kernel, whose results a remat policy may keep (`step.REMAT`).
KERNEL = "dot_product_attention_fwd"
# Largest difference from plain attention that rounding to bfloat16 explains, as a share of the largest value.
TOLERANCE = 0.03


def make_cudnn(mesh: Mesh, most_records: int) -> Attend:
    """cuDNN's attention for bfloat16: causal packed rows of at most `most_records` records, and calls that see all.

    Other calls go to plain XLA. The kernel is given slots for positions, as on TPUs (`make_splash`). JAX's public
    function takes whole sequences only and would let packed records see each other; the one behind it takes where each
    record begins and how long it is (jax PR 25812). For its gradient it keeps `4 * (most_records + 1)` bytes a head
    and slot, as much as its result when records are 63 and heads 128 wide. Its backward pass sums the gradients of the
    queries in as many whole float32 rows as there may be runs, and that once more for each 256 slots of a row where
    XLA is asked for deterministic operations, so rows are given to it a few at a time (`WORKSPACE`).
    """

    def attend(
        q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], v: Float[Array, "b s k h"], scope: Scope
    ) -> Float[Array, "b t n h"]:
        segments, heads = scope.query_segments, "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        spec = P(BATCH_AXES, None, heads, None)
        share = functools.partial(jax.shard_map, mesh=mesh, out_specs=spec, check_vma=False)
        is_taken = q.shape[-1] <= WIDEST_HEAD and q.shape[-1] % 8 == 0 and q.size // mesh.size < MOST_PLACES
        if q.dtype != jnp.bfloat16 or scope.window is not None or not is_taken:
            return attend_xla(q, k, v, scope)
        if segments is None and not scope.causal:
            return share(_attend_all, in_specs=(spec, spec, spec))(q, k, v)
        if segments is not None and segments is scope.key_segments and scope.causal:
            run = functools.partial(_attend_packed, most_runs=most_records + 1)
            return share(run, in_specs=(spec, spec, spec, P(BATCH_AXES, None)))(q, k, v, segments)
        return attend_xla(q, k, v, scope)

    return attend


def find_runs(segment_ids: Int[Array, "b t"], most: int) -> tuple[Int[Array, "b m"], Int[Array, "b _"]]:
    """Lengths of the runs of equal ids, `most` of them, and where each begins, one more; -1 where there is none.

    Padding is a run like any other, for what the kernel does not visit it leaves unwritten. There may be no more runs
    than `most`: those after them would be lost.

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
    # JAX 0.10 counts keys by the queries' heads, and reads elsewhere if there are fewer (jax PR 39521).
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    lengths, starts = find_runs(segment_ids, most_runs)
    b, t, n, h = q.shape
    rows = max(1, WORKSPACE // (most_runs * t * n * h * 4))
    parts = zip(*(jnp.array_split(x, -(-b // rows)) for x in (q, k, v, lengths, starts)), strict=True)
    return jnp.concatenate([_call_packed(*part) for part in parts])


def _call_packed(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t n h"],
    v: Float[Array, "b t n h"],
    lengths: Int[Array, "b m"],
    starts: Int[Array, "b _"],
) -> Float[Array, "b t n h"]:
    runs = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": starts, "kv_offsets": starts}
    return _call(q, k, v, mask="PADDING_CAUSAL", **runs)


def _attend_all(
    q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], v: Float[Array, "b s k h"]
) -> Float[Array, "b t n h"]:
    # JAX refuses the gradient of odd lengths, such as a tower's, as if every call had a bias: a slot more is not seen.
    odd = [x.shape[1] % 2 for x in (q, k)]
    if not any(odd):
        return _call(q, k, v)
    (t, s), rows = (q.shape[1], k.shape[1]), q.shape[:1]
    q, k, v = (
        jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)]) for x, more in zip((q, k, v), [*odd, odd[1]], strict=True)
    )
    seen = {"q_seqlen": jnp.full(rows, t, jnp.int32), "kv_seqlen": jnp.full(rows, s, jnp.int32)}
    return _call(q, k, v, mask="PADDING", **seen)[:, :t]


def _call(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    mask: str = "NO_MASK",
    **runs: Any,
) -> Any:
    from jax._src.cudnn import fused_attention_stablehlo as fused

    return fused.dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask_type=fused.MaskType[mask], **runs)


def is_known(device: Any) -> bool:
    """Whether it is a GPU of an architecture that has the kernel."""
    capability = str(getattr(device, "compute_capability", ""))
    return capability.replace(".", "", 1).isdigit() and float(capability) >= CAPABILITY


@contextlib.contextmanager
def for_absent_gpus() -> Iterator[None]:
    """Lets JAX lower the kernel for GPUs that are not here: what it asks of the local one is answered for a Hopper."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    answers = {
        "check_cudnn_version": lambda: 92300,
        "check_compute_capability": lambda capability: True,
        "is_cuda_compute_capability_equal": lambda capability: False,
    }
    kept = {name: getattr(fused, name) for name in answers}
    for name, answer in answers.items():
        setattr(fused, name, answer)
    try:
        yield
    finally:
        for name, asked in kept.items():
            setattr(fused, name, asked)


def why_not() -> str | None:
    """What keeps a process from using this attention; found by trying it on one of its GPUs, packed and as a tower.

    The kernel is no public part of JAX, and cuDNN is whatever is installed, so neither is trusted unseen: a kernel
    that lets one record see another would spoil a run without a word.
    """
    device = jax.local_devices()[0]
    if not is_known(device):
        return f"{device.device_kind} is no NVIDIA GPU from Hopper on"
    try:
        with jax.default_device(device):
            error = _largest_error()
    except Exception as reason:  # Whatever a private function of another version, or a driver, comes up with.
        return f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else 'no message'}"
    return None if error <= TOLERANCE else f"it differs from plain attention by {error:.3g}, more than {TOLERANCE}"


def _largest_error() -> float:
    """How far the kernel's results and gradients are from plain attention's, as a share of the largest value.

    On rows of several records and padding with grouped queries, and on a tower's odd number of patches.
    """
    lengths = ((200, 100, 150, 62), (1, 500, 1, 10))
    ids = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], row) for row in lengths]).astype(np.int32))
    slots = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    packed = Scope(ids, ids, slots, slots, causal=True)
    return max(
        _difference(lambda q, k, v: _attend_packed(q, k, v, ids, most_runs=4), packed, t=512, heads=(4, 2), h=128),
        _difference(_attend_all, Scope(), t=577, heads=(4, 4), h=64),
    )


def _difference(run: Any, scope: Scope, *, t: int, heads: tuple[int, int], h: int) -> float:
    rng = np.random.default_rng(0)
    n, kv = heads
    q, k, v, weights = (jnp.asarray(rng.standard_normal((2, t, n, h)), jnp.bfloat16) for n in (n, kv, kv, n))

    def both(run: Any) -> Any:
        def total(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            mixed = run(q, k, v)
            return (mixed * weights).astype(jnp.float32).sum(), mixed

        return map(jnp.float32, jax.tree.leaves(jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)))

    pairs = zip(both(run), both(lambda q, k, v: attend_xla(q, k, v, scope)), strict=True)
    # Infinite where a value is not finite: the largest of values with a NaN is not NaN on every device.
    errors = [jnp.where(jnp.isfinite(a).all(), jnp.abs(a - b).max() / jnp.abs(b).max(), jnp.inf) for a, b in pairs]
    return float(jnp.stack(errors).max())
