"""Weights and keys for decoding on CPUs: those of an output side by side, read once, as they come from memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float, Int, Int8, UInt8

from llava_jax.models.attention import attend_whole, score_whole
from llava_jax.models.layers import Embed, Linear
from llava_jax.models.llama import Llama, replace_linear_layers
from llava_jax.models.quantized import BLOCK, QuantizedLinear, dequantize, kernel_shape, levels

WEIGHT = ".weight"
# A kernel turned, or its codes.
Weight = Float[Array, "f d"] | Int8[Array, "f d"]
# More tokens are multiplied faster by the library that XLA calls, which first copies the weights piece by piece.
MOST_STREAMED = 8
# Outputs whose weights are read in turns: a processor fetches several streams at a time, and has room for so many sums.
STREAMS, STREAMS_OF_TWO = 4, 8


def multiply(x: Float[Array, "*axes d"], weight: Float[Array, "f d"]) -> Float[Array, "*axes f"]:
    """`x @ weight.T` in float32."""
    tokens = x.reshape(-1, x.shape[-1])
    if len(tokens) <= MOST_STREAMED:
        product = _stream(tokens, weight)
    else:
        # A call, or XLA's CPU backend would widen the bfloat16 kernels of all layers before the first.
        with set_xla_metadata(inlineable="false"):
            product = _of_many(tokens, weight)
    return product.reshape(*x.shape[:-1], -1)


@jax.jit
def _of_many(tokens: Float[Array, "b d"], weight: Float[Array, "f d"]) -> Float[Array, "b f"]:
    # The weights first, and no operand turned in the product: the library is slow at reading those.
    weight, turned = jax.lax.optimization_barrier((weight, tokens.T))
    product = jnp.matmul(weight, turned, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product).T


def _stream(tokens: Float[Array, "b d"], weight: Weight) -> Float[Array, "b f"]:
    # A call of its own, or XLA would compute what the tokens come from anew for every output.
    with set_xla_metadata(inlineable="false"):
        return _of_few(tokens, weight, streams=STREAMS_OF_TWO if len(tokens) <= 2 else STREAMS)


def score_streamed(q: Float[Array, "b t k g h"], k: Float[Array, "b s k h"]) -> Float[Array, "b k g t s"]:
    """Products of queries and keys in float32, as of tokens and weights: XLA's own take one core."""
    b, t, num_kv_heads, g, h = q.shape
    if t * g > MOST_STREAMED:
        return score_whole(q, k)
    queries = jnp.moveaxis(q, 1, 3).reshape(b * num_kv_heads, g * t, h)
    keys = jnp.moveaxis(k, 2, 1).reshape(b * num_kv_heads, -1, h)
    with set_xla_metadata(inlineable="false"):
        # The keys of a head are few: one stream, whose sums need not be put in order.
        scores = jax.vmap(functools.partial(_of_few, streams=1))(queries, keys)
    return scores.reshape(b, num_kv_heads, g, t, -1)


# What decoding attends with; of more than 8 queries a key head, scores are XLA's own product.
attend_streamed = functools.partial(attend_whole, score=score_streamed)


@functools.partial(jax.jit, static_argnames="streams")
def _of_few(tokens: Float[Array, "b d"], weight: Weight, *, streams: int) -> Float[Array, "b f"]:
    """One pass over the weights that adds to a sum for each token and stream.

    Fast where XLA may add up in any order (llava_jax/compiler.py): it makes a loop over vectors of it, and every weight
    is loaded once.
    """
    even = len(weight) // streams * streams
    tokens = tokens.astype(jnp.float32)
    return jnp.concatenate([_pass(tokens, weight[:even], streams), _pass(tokens, weight[even:], 1)], axis=1)


def _pass(tokens: Float[Array, "b d"], weight: Weight, streams: int) -> Float[Array, "b f"]:
    parts = weight.reshape(streams, -1, weight.shape[1])
    products = [token * part.astype(jnp.float32) for token in tokens for part in parts]
    sums = jax.lax.reduce(products, [jnp.float32(0)] * len(products), _add, dimensions=(1,))
    return jnp.stack(sums).reshape(len(tokens), -1)


def _add(sums: list[Array], more: list[Array]) -> list[Array]:
    return [a + b for a, b in zip(sums, more, strict=True)]


class StreamedLinear(nnx.Module):
    """A linear layer without bias that holds its kernel turned, as torch does; computes in the dtype of `x`."""

    def __init__(self, linear: Linear):
        d, f = linear.kernel.shape
        self.weight = nnx.Param(jnp.zeros((f, d), linear.kernel.dtype))

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes f"]:
        return multiply(x, self.weight[...]).astype(x.dtype)

    @property
    def kernel(self) -> Float[Array, "d f"]:
        return self.weight[...].T


class StreamedQuantizedLinear(nnx.Module):
    """A quantized layer whose codes are held turned; for few tokens they are multiplied as they are read, in float32.

    For more the kernel is rounded to x's dtype, int8's too, as `multiply` of quantized.py does beyond its 64 tokens.
    """

    def __init__(self, linear: QuantizedLinear):
        codes, absmax = linear.codes, linear.absmax
        self.turned_codes = nnx.Param(jnp.zeros(codes.shape[::-1], codes.dtype))
        self.turned_absmax = nnx.Param(jnp.zeros(absmax.shape[::-1], absmax.dtype))

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes f"]:
        codes, absmax = self.turned_codes[...], self.turned_absmax[...]
        tokens = x.reshape(-1, x.shape[-1])
        if len(tokens) <= MOST_STREAMED and codes.dtype == jnp.int8:
            product = _stream(tokens, codes) * (absmax[:, 0] / 127)
        else:
            # A call, as above: barriers do not keep XLA from making all kernels first.
            with set_xla_metadata(inlineable="false"):
                compute = _of_few_in_nf4 if len(tokens) <= MOST_STREAMED else _of_many_in_codes
                product = compute(tokens, codes, absmax)
        return product.reshape(*x.shape[:-1], -1).astype(x.dtype)


@jax.jit
def _of_many_in_codes(
    tokens: Float[Array, "b d"], codes: Int8[Array, "f c"] | UInt8[Array, "f c"], absmax: Float[Array, "f s"]
) -> Float[Array, "b f"]:
    return multiply(tokens, dequantize(codes.T, absmax.T, tokens.dtype).T)


@jax.jit
def _of_few_in_nf4(
    tokens: Float[Array, "b d"], codes: UInt8[Array, "f c"], absmax: Float[Array, "f s"]
) -> Float[Array, "b f"]:
    """One pass over the codes: levels are told apart bit by bit, once for all tokens."""
    f, s = absmax.shape
    first, second = (tokens.astype(jnp.float32)[:, i::2].reshape(len(tokens), s, -1) for i in (0, 1))
    blocks = codes.reshape(f, s, -1)
    highs, lows = (levels(half) * absmax[:, :, None] for half in (blocks >> 4, blocks & 15))
    products = [a * highs + b * lows for a, b in zip(first, second, strict=True)]
    return jnp.stack(jax.lax.reduce(products, [jnp.float32(0)] * len(products), _add, dimensions=(1, 2)))


class StreamedEmbed(nnx.Module):
    """A table of vectors; the barrier keeps XLA from widening all of it, before a loop, to what its use computes in."""

    def __init__(self, embed: Embed):
        self.embedding = embed.embedding

    def __call__(self, ids: Int[Array, "*axes"]) -> Float[Array, "*axes d"]:
        return jnp.take(*jax.lax.optimization_barrier((self.embedding[...], ids)), axis=0)


def stream_layers(decoder: Llama) -> None:
    """Makes a decoder's table, linear layers and head streamed ones, but for adapted layers and nf4 in odd blocks."""

    def streamed(linear: Any) -> Any:
        if isinstance(linear, QuantizedLinear):
            has_whole_blocks = linear.codes.dtype == jnp.int8 or kernel_shape(linear.codes)[0] % BLOCK == 0
            return StreamedQuantizedLinear(linear) if has_whole_blocks else linear
        return StreamedLinear(linear) if isinstance(linear, Linear) else linear

    replace_linear_layers(decoder, streamed)
    table: Any = StreamedEmbed(decoder.embed_tokens)
    decoder.embed_tokens = table
    if not decoder.config.tie_embeddings:
        head: Any = StreamedLinear(decoder.lm_head)
        decoder.lm_head = head
    decoder.is_streamed = True
