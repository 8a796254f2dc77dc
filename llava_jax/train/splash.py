"""Attention on TPUs: the Pallas splash kernel on every device's own rows and heads."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llava_jax.models.attention import ATTENTION, Attend, Scope, attend_xla
from llava_jax.train.sharding import BATCH_AXES

# A key's lane width in the vector unit: blocks, and with them rows, are multiples of it.
LANES = 128
# Queries and keys that a block of the kernel holds at most.
BLOCK = 512


def make_splash(mesh: Mesh, *, interpret: bool = False) -> Attend:
    """Splash attention for packed causal rows whose length is a multiple of 128; other calls go to plain XLA.

    Those others are the tower's (its 577 tokens fit no block, and see everything). The kernel is given slots for
    positions: within a segment both increase together, and it sees no other segment. Heads are spread over
    `tensor` if it divides them, else every device of that axis computes all of them.
    """

    def attend(
        q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], v: Float[Array, "b s k h"], scope: Scope
    ) -> Float[Array, "b t n h"]:
        segments = scope.query_segments
        is_row = segments is scope.key_segments and q.shape[1] == k.shape[1]
        if segments is None or not (is_row and scope.causal and q.shape[1] % LANES == 0):
            return attend_xla(q, k, v, scope)
        heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None

        def rows(
            q: Float[Array, "b t n h"], k: Float[Array, "b t k h"], v: Float[Array, "b t k h"], ids: Int[Array, "b t"]
        ) -> Float[Array, "b t n h"]:
            _, t, n, h = q.shape
            kernel = _kernel(t, n, scope.window, interpret=interpret)
            q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(h**-0.5, q.dtype), k, v))
            mixed = jax.vmap(lambda q, k, v, i: kernel(q, k, v, segment_ids=kernels.SegmentIds(i, i)))(q, k, v, ids)
            return mixed.swapaxes(1, 2)

        spec = P(BATCH_AXES, None, heads, None)
        # The kernel does not say along which axes its results vary, so that check is off.
        run = jax.shard_map(
            rows, mesh=mesh, in_specs=(spec, spec, spec, P(BATCH_AXES, None)), out_specs=spec, check_vma=False
        )
        return run(q, k, v, segments)

    return attend


def _kernel(length: int, num_heads: int, window: int | None, *, interpret: bool) -> Any:
    if window is None:
        mask: masks.Mask = masks.CausalMask((length, length))
    else:
        # The original kernel counts keys to the left of the query; our window counts the query itself.
        mask = masks.LocalMask((length, length), (window - 1, 0), 0)
    block = next(size for size in range(min(BLOCK, length), 0, -LANES) if length % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
