"""Weights in 8 or 4 bits: linear layers of the decoder as codes and scales, for inference and under adapters."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8, UInt8

from llava_jax.models.llama import Llama, replace_linear_layers

Scheme = Literal["int8", "nf4"]
CODES, ABSMAX = ".codes", ".absmax"
# The same transposed; see models/streamed.py.
TURNED_CODES, TURNED_ABSMAX = ".turned_codes", ".turned_absmax"
# Inputs of one output that share a scale in nf4.
BLOCK = 64
# Of so few, as in decoding, a product's result is far smaller than its kernel, even held twice and in float32.
FEW_TOKENS = 64
# Quantiles of the normal distribution, scaled to [-1, 1], zero among them (Dettmers et al., arXiv 2305.14314, E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
Codes = Int8[Array, "c f"] | UInt8[Array, "c f"]


def quantize(kernel: Float[Array, "d f"], scheme: Scheme) -> tuple[Codes, Float[Array, "s f"]]:
    """Codes of a kernel, and the largest magnitudes that they are shares of, in float32.

    int8: the nearest of -127 ... 127, one scale for each output. nf4: the nearest of 16 levels, a scale for every 64
    inputs of an output (fewer in the last block), two codes in a byte, the earlier input's in the upper half:
    those of `quantize_4bit` of bitsandbytes on the transpose.
    """
    wide = kernel.astype(jnp.float32)
    d, f = wide.shape
    if scheme == "int8":
        absmax = jnp.abs(wide).max(axis=0, keepdims=True)
        return jnp.round(wide * 127 / _nonzero(absmax)).astype(jnp.int8), absmax
    blocks = jnp.pad(wide, ((0, -d % BLOCK), (0, 0))).reshape(-1, BLOCK, f)
    absmax = jnp.abs(blocks).max(axis=1)
    shares = (blocks / _nonzero(absmax)[:, None]).reshape(-1, f)[:d]
    codes = jnp.zeros(shares.shape, jnp.uint8)
    for low, high in zip(NF4, NF4[1:], strict=False):
        codes += shares > (low + high) / 2
    return codes[0::2] << 4 | codes[1::2], absmax


def dequantize(codes: Codes, absmax: Float[Array, "s f"], dtype: jax.typing.DTypeLike) -> Float[Array, "d f"]:
    """The kernel that codes stand for, computed in float32 and rounded once."""
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * (absmax / 127)).astype(dtype)
    return jnp.stack(_halves(codes, absmax, dtype), axis=1).reshape(kernel_shape(codes))


def kernel_shape(codes: Any) -> tuple[int, int]:
    """The shape of the kernel that was quantized."""
    rows, columns = codes.shape
    return rows * (1 if codes.dtype == jnp.int8 else 2), columns


def is_quantized(name: str) -> bool:
    """Whether a parameter is half of a quantized kernel, to be kept in its own dtype."""
    return name.endswith((CODES, ABSMAX, TURNED_CODES, TURNED_ABSMAX))


@jax.custom_vjp
def multiply(x: Float[Array, "b t d"], codes: Codes, absmax: Float[Array, "s f"]) -> Float[Array, "b t f"]:
    """`x W` with the kernel dequantized for this product alone; only x has a gradient.

    The kernel is rounded to x's dtype, but that of int8 for few tokens.
    """
    # Behind the barrier nothing depends on the weights alone, or XLA would dequantize them before a decoding loop, and
    # keep what a forward pass dequantized for the backward pass.
    x, codes, absmax = jax.lax.optimization_barrier((x, codes, absmax))
    if x.size > FEW_TOKENS * x.shape[-1]:
        return x @ dequantize(codes, absmax, x.dtype)
    if codes.dtype == jnp.int8:
        # Scaled after the product: on GPUs a scaled kernel would be written out, Triton's product can read the codes.
        products = jnp.matmul(x, codes.astype(x.dtype), preferred_element_type=jnp.float32)
        return (products * (absmax / 127)).astype(x.dtype)
    # Half by half: to put the rows of a whole kernel in turn, XLA's TPU compiler would write it out first, in float32.
    halves = zip((x[..., 0::2], x[..., 1::2]), _halves(codes, absmax, x.dtype), strict=True)
    first, second = (jnp.matmul(part, kernel, preferred_element_type=jnp.float32) for part, kernel in halves)
    return (first + second).astype(x.dtype)


def _forward(x: Array, codes: Array, absmax: Array) -> tuple[Array, tuple[Array, Array]]:
    return multiply(x, codes, absmax), (codes, absmax)


def _backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    gradient, codes, absmax = jax.lax.optimization_barrier((gradient, *saved))
    return gradient @ dequantize(codes, absmax, gradient.dtype).T, None, None


multiply.defvjp(_forward, _backward)


class QuantizedLinear(nnx.Module):
    """A linear layer without bias whose kernel is held as codes."""

    def __init__(self, linear: nnx.Linear, scheme: Scheme):
        d, f = linear.kernel.shape
        if scheme == "nf4" and d % 2:
            raise ValueError(f"nf4 holds two inputs in a byte; got a layer of {d}. Use int8.")
        shapes = ((d, f), (1, f)) if scheme == "int8" else ((d // 2, f), (-(-d // BLOCK), f))
        self.codes = nnx.Param(jnp.zeros(shapes[0], jnp.int8 if scheme == "int8" else jnp.uint8))
        self.absmax = nnx.Param(jnp.zeros(shapes[1], jnp.float32))

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        return multiply(x, self.codes[...], self.absmax[...])


def quantize_layers(decoder: Llama, scheme: Scheme) -> None:
    """Makes every linear layer of a decoder's layers a quantized one, in either form of them; the head stays whole."""
    replace_linear_layers(decoder, functools.partial(QuantizedLinear, scheme=scheme))


def _halves(
    codes: UInt8[Array, "c f"], absmax: Float[Array, "s f"], dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "c f"], Float[Array, "c f"]]:
    """Rows 0, 2, 4, ... and 1, 3, 5, ... of an nf4 kernel, computed in float32 and rounded once."""
    scale = jnp.repeat(absmax, BLOCK // 2, axis=0)[: len(codes)]
    return (levels(codes >> 4) * scale).astype(dtype), (levels(codes & 15) * scale).astype(dtype)


def levels(codes: UInt8[Array, "*axes"]) -> Float[Array, "*axes"]:
    """The level of each code: four rounds of selection, bit by bit, since a table would be gathered from."""
    chosen = [jax.lax.full_like(codes, level, jnp.float32) for level in NF4]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        # Not `jnp.where`, a call, which would stay one in what must not be inlined (models/streamed.py).
        chosen = [jax.lax.select(is_set, high, low) for low, high in zip(chosen[::2], chosen[1::2], strict=True)]
    return chosen[0]


def _nonzero(absmax: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(absmax == 0, 1, absmax)
