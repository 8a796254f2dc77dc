"""Attention of every network here: one function, and the scope that says which keys a query sees."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# What attention computes, for remat policies that save it.
ATTENTION = "attention"
# Into how many blocks of queries plain XLA cuts a causal sequence at most, and the fewest queries of one.
MOST_BLOCKS = 8
SMALLEST_BLOCK = 128


class Scope(NamedTuple):
    """Which keys each query may see; a field left None does not restrict.

    A key is visible when it belongs to the query's segment, its position is not later than the query's
    (`causal`), and it is fewer than `window` positions back. Segments and positions are kept apart
    from any dense mask because flash kernels take them as they are.

    Example, one row holding two records (segments 1 and 2) and a padding slot (segment 0), causal:

        segments  = [1, 1, 1, 2, 2, 0]
        positions = [0, 1, 2, 0, 1, 0]   ->   the query at slot 4 sees slots 3 and 4.
    """

    query_segments: Int[Array, "b t"] | None = None
    key_segments: Int[Array, "b s"] | None = None
    query_positions: Int[Array, "b t"] | None = None
    key_positions: Int[Array, "b s"] | None = None
    causal: bool = False
    window: int | None = None

    def mask(self) -> Bool[Array, "b t s"] | None:
        """The dense form: True where the query may see the key, None where everything may."""
        mask = None
        if self.query_segments is not None and self.key_segments is not None:
            mask = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.causal:
            assert self.query_positions is not None, "causal needs the queries' positions"
            assert self.key_positions is not None, "causal needs the keys' positions"
            distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
            seen = distance >= 0
            if self.window is not None:
                seen &= distance < self.window
            mask = seen if mask is None else mask & seen
        return mask

    def is_causal_self(self) -> bool:
        """Whether a sequence attends to itself: told by positions that are one array, in the order of slots.

        Records of a packed row follow each other, so no query of a record sees a key of a later slot.
        """
        return self.causal and self.query_positions is self.key_positions

    def block(self, begin: int, end: int) -> "Scope":
        """The scope of the queries from slot `begin` to `end`, and of the keys before `end`."""

        def part(x: Array | None, first: int) -> Array | None:
            return None if x is None else x[:, first:end]

        return self._replace(
            query_segments=part(self.query_segments, begin),
            key_segments=part(self.key_segments, 0),
            query_positions=part(self.query_positions, begin),
            key_positions=part(self.key_positions, 0),
        )


@runtime_checkable
class Attend(Protocol):
    """An implementation of grouped-query attention; all of them pass the same leakage test."""

    def __call__(
        self,
        q: Float[Array, "b t n h"],
        k: Float[Array, "b s k h"],
        v: Float[Array, "b s k h"],
        scope: Scope,
    ) -> Float[Array, "b t n h"]: ...


@runtime_checkable
class Constrain(Protocol):
    """Pins the layout of an activation on the mesh; the identity where there is none."""

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]: ...


# What takes the place of `score_whole`.
Score = Callable[[Float[Array, "b t k g h"], Float[Array, "b s k h"]], Float[Array, "b k g t s"]]


def unconstrained(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    return x


def attend_xla(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    scope: Scope,
) -> Float[Array, "b t n h"]:
    """Softmax attention in plain XLA, for any device.

    A causal sequence is cut into blocks of queries, each of which is given the keys before its end alone: nearly half
    of the scores are not computed, and those of a block stay in a CPU's caches.
    """
    t = q.shape[1]
    size = max(SMALLEST_BLOCK, -(-t // MOST_BLOCKS))
    if not scope.is_causal_self() or t <= size:
        return attend_whole(q, k, v, scope)
    ends = [(begin, min(begin + size, t)) for begin in range(0, t, size)]
    blocks = [attend_whole(q[:, a:z], k[:, :z], v[:, :z], scope.block(a, z)) for a, z in ends]
    return jnp.concatenate(blocks, axis=1)


def score_whole(q: Float[Array, "b t k g h"], k: Float[Array, "b s k h"]) -> Float[Array, "b k g t s"]:
    """Products of every query and every key, in float32."""
    return jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)


def attend_whole(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    scope: Scope,
    *,
    score: Score = score_whole,
) -> Float[Array, "b t n h"]:
    """Softmax attention of every query and every key at once; `score` multiplies them.

    The softmax runs in float32 whatever the inputs are, as in `eager_attention_forward` of transformers.
    """
    b, t, n, h = q.shape
    num_kv_heads = k.shape[2]
    q_btkgh = q.reshape(b, t, num_kv_heads, n // num_kv_heads, h)
    scores = score(q_btkgh, k) * h**-0.5
    mask = scope.mask()
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    # Heads before queries: in the other order XLA transposes the values on CPUs, in decoding all of the cache.
    mixed = jnp.einsum("bkgts,bskh->bkgth", weights, v)
    return jnp.moveaxis(mixed, 3, 1).reshape(b, t, n, h)
