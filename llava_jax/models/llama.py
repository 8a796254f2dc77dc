"""The Llama decoder: grouped-query attention, rotary positions, RMS norm, gated MLP, KV cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from llava_jax.models.attention import ATTENTION, Attend, Constrain, Scope, attend_xla, unconstrained
from llava_jax.models.layers import Embed, Linear, Remat, make_layers, run_layers
from llava_jax.shapes import LinearScaling, Llama3Scaling, RopeScaling, TextConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer; every head of every row is a row of its own.

    A head's keys lie together when attention reads them, and its products take the cache as it is. Where they need
    another view of it, XLA's CPU backend fuses that with the write, and copies the whole cache at every token.
    """

    k: Float[Array, "bk s h"]
    v: Float[Array, "bk s h"]


class Cache(NamedTuple):
    """Slots of a batch, filled from the left, the same ones in every row, so that a write is one slice and in place.

    A row's token may have any position, whatever its slot; `NOWHERE` marks slots that no query sees.
    """

    layers: tuple[LayerCache, ...]
    positions: Int[Array, "b s"]
    filled: Int[Array, ""]

    def grow(self, length: int) -> "Cache":
        """The same with `length` slots in all."""
        more = length - self.positions.shape[1]
        layers = jax.tree.map(lambda kept: jnp.pad(kept, [(0, 0), (0, more), (0, 0)]), self.layers)
        positions = jnp.pad(self.positions, [(0, 0), (0, more)], constant_values=NOWHERE)
        return Cache(layers, positions, self.filled)


# Later than the position of any query.
NOWHERE = 2**30


def empty_cache(config: TextConfig, *, batch: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Room for `length` tokens of each row."""
    shape = (batch * config.num_kv_heads, length, config.head_dim)
    layers = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
    return Cache(layers, jnp.full((batch, length), NOWHERE, jnp.int32), jnp.zeros((), jnp.int32))


class Rotary(NamedTuple):
    """Cosines and sines of the rotary embedding, float32: bfloat16 would round position 257 to 256."""

    cos: Float[Array, "b t h"]
    sin: Float[Array, "b t h"]


def frequencies(*, head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, " f"]:
    """Radians per position of each pair of a head, slower where the context was stretched.

    `_compute_linear_scaling_rope_parameters` and `_compute_llama3_parameters` of transformers.
    """
    frequency = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    match scaling:
        case LinearScaling():
            return frequency / scaling.factor
        case Llama3Scaling():
            turns = scaling.original_positions * frequency / (2 * jnp.pi)
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
            return kept * frequency + (1 - kept) * frequency / scaling.factor
    return frequency


def rotary(positions: Int[Array, "b t"], *, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rotary:
    """Angles of `LlamaRotaryEmbedding`: the two halves of a head turn together."""
    inverse_frequency = frequencies(head_dim=head_dim, theta=theta, scaling=scaling)
    angles = positions[:, :, None].astype(jnp.float32) * inverse_frequency
    # Joined last: XLA computes a cosine anew wherever it is used, for each head of each layer, but not what is joined.
    cos, sin = (jnp.concatenate([part, part], axis=-1) for part in (jnp.cos(angles), jnp.sin(angles)))
    return Rotary(cos, sin)


def rotate(x: Float[Array, "b t n h"], angles: Rotary) -> Float[Array, "b t n h"]:
    """Turns each pair (i, i + h/2) of every head by its angle (`apply_rotary_pos_emb` of transformers)."""
    turned = jax.lax.platform_dependent(x, cpu=_turned, default=_turned_by_shifts)
    return (x * angles.cos[:, :, None] + turned * angles.sin[:, :, None]).astype(x.dtype)


def _turned(x: Float[Array, "b t n h"]) -> Float[Array, "b t n h"]:
    """(x, y) -> (-y, x) for the halves of every head."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    signs = jnp.array([[-1], [1]], x.dtype)
    return (signs * jnp.flip(halves, axis=-2)).reshape(x.shape)


def _turned_by_shifts(x: Float[Array, "b t n h"]) -> Float[Array, "b t n h"]:
    """The same, with zeros moving in; halves as an axis, XLA's TPU compiler would pad to the width of a head each."""
    half = x.shape[-1] // 2
    up, down = (jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 3 + [(by, -by, 0)]) for by in (half, -half))
    return up - down


class RMSNorm(nnx.Module):
    """`LlamaRMSNorm`: the mean square in float32, the scale applied after the cast back; it may be float32 itself."""

    def __init__(self, dim: int, eps: float, *, param_dtype: jax.typing.DTypeLike):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (self.scale[...] * wide.astype(x.dtype)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention, over the sequence itself or over a cache."""

    def __init__(self, config: TextConfig, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        d, h = config.embed_dim, config.head_dim
        linear = functools.partial(Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.q_proj = linear(d, config.num_heads * h)
        self.k_proj = linear(d, config.num_kv_heads * h)
        self.v_proj = linear(d, config.num_kv_heads * h)
        self.o_proj = linear(config.num_heads * h, d)
        self.head_dim = h

    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Rotary,
        scope: Scope,
        attend: Attend,
        cache: LayerCache | None = None,
        slot: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        b, t, _ = x.shape
        q, k, v = (project(x).reshape(b, t, -1, self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is None:
            # The name lets a remat policy keep the result; kernels name what else their gradient needs.
            mixed = checkpoint_name(attend(q, k, v, scope), ATTENTION)
        else:
            num_kv_heads = k.shape[2]
            q, k, v = (heads_as_rows(x, num_kv_heads) for x in (q, k, v))
            new = (x[:, :, 0].astype(kept.dtype) for x, kept in zip((k, v), cache, strict=True))
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
            cache = LayerCache(*map(write, cache, new))
            mixed = attend(q, cache.k[:, :, None], cache.v[:, :, None], scope)
            mixed = mixed.reshape(b, num_kv_heads, t, -1).swapaxes(1, 2)
        return self.o_proj(mixed.reshape(b, t, -1)), cache


def heads_as_rows(x: Float[Array, "b t n h"], num_kv_heads: int) -> Float[Array, "bk t g h"]:
    """Each of the groups of heads that share a key as a row of its own."""
    b, t, n, h = x.shape
    return x.reshape(b, t, num_kv_heads, -1, h).swapaxes(1, 2).reshape(-1, t, n // num_kv_heads, h)


class Mlp(nnx.Module):
    """SwiGLU (`LlamaMLP`)."""

    def __init__(self, config: TextConfig, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        d, f = config.embed_dim, config.hidden_dim
        linear = functools.partial(Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = linear(d, f)
        self.up_proj = linear(d, f)
        self.down_proj = linear(f, d)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """One decoder layer (`LlamaDecoderLayer`)."""

    def __init__(self, config: TextConfig, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.embed_dim, config.norm_eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.embed_dim, config.norm_eps, param_dtype=param_dtype)
        self.mlp = Mlp(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        angles: Rotary,
        scope: Scope,
        attend: Attend,
        cache: LayerCache | None = None,
        slot: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "b t d"], LayerCache | None]:
        mixed, cache = self.self_attn(self.input_layernorm(x), angles, scope, attend, cache, slot)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
    """The decoder without its input: it takes embeddings, since a picture has no token ids."""

    def __init__(self, config: TextConfig, *, stacked: bool, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embed(config.vocab_size, config.embed_dim, param_dtype=param_dtype, rngs=rngs)
        make = functools.partial(Layer, config, param_dtype=param_dtype, rngs=rngs)
        self.layers = make_layers(make, config.num_layers, stacked=stacked)
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, param_dtype=param_dtype)
        if not config.tie_embeddings:
            self.lm_head = Linear(
                config.embed_dim, config.vocab_size, use_bias=False, param_dtype=param_dtype, rngs=rngs
            )
        # See models/streamed.py.
        self.is_streamed = False
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        *,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> Float[Array, "b t d"]:
        """Normed hidden states of whole rows; tokens see their own segment, themselves and what came before."""
        angles = self._angles(positions)
        scope = self._scope(positions, positions, segment_ids)

        def step(layer: Layer, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
            return constrain(layer(x, angles, scope, attend)[0])

        return self.norm(run_layers(self.layers, constrain(x), step, remat=remat))

    def extend(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        cache: Cache,
        *,
        attend: Attend = attend_xla,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Hidden states of tokens that follow what the cache holds, and the cache with them written in.

        The cache must have room for them; positions may be `NOWHERE`, for padding.
        """
        assert isinstance(self.layers, nnx.List), "decoding needs a tuple of layers; see unstack_layers"
        slot = cache.filled
        key_positions = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions, slot, axis=1)
        as_rows = functools.partial(jnp.repeat, repeats=self.config.num_kv_heads, axis=0)
        angles, scope = self._angles(positions), self._scope(as_rows(positions), as_rows(key_positions), None)
        extended = []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x, layer_cache = layer(x, angles, scope, attend, layer_cache, slot)
            extended.append(layer_cache)
        return self.norm(x), Cache(tuple(extended), key_positions, slot + x.shape[1])

    def head(self) -> Float[Array, "d v"]:
        """The matrix from hidden states to logits; the embedding's transpose when tied."""
        if self.config.tie_embeddings:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def _angles(self, positions: Int[Array, "b t"]) -> Rotary:
        config = self.config
        return rotary(positions, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)

    def _scope(
        self,
        query_positions: Int[Array, "b t"],
        key_positions: Int[Array, "b s"],
        segment_ids: Int[Array, "b t"] | None,
    ) -> Scope:
        return Scope(
            query_segments=segment_ids,
            key_segments=segment_ids,
            query_positions=query_positions,
            key_positions=key_positions,
            causal=True,
            window=self.config.sliding_window,
        )


def replace_linear_layers(decoder: Llama, make: Callable[[Any], nnx.Module]) -> None:
    """Puts `make(layer)` in the place of every linear layer of a decoder's layers, in either form of them."""
    layers: Sequence[Any] = decoder.layers if isinstance(decoder.layers, nnx.List) else [decoder.layers]
    for layer in layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(vars(block).items()):
                if isinstance(linear, nnx.Module):
                    setattr(block, name, make(linear))
