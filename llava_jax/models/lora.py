"""LoRA (Hu et al., arXiv 2106.09685): what a frozen linear layer learns, as two thin factors beside its kernel."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from llava_jax.models.llama import Llama, replace_linear_layers
from llava_jax.models.parameters import Parameters
from llava_jax.models.quantized import QuantizedLinear, kernel_shape, multiply

A, B, DROPOUT = ".lora_a", ".lora_b", ".lora_dropout"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters on every linear layer of the decoder but the head, as `find_all_linear_names` of the original chooses.

    What they add is scaled by alpha / rank; `dropout` is the share of their inputs that a training step leaves out.
    """

    rank: int
    alpha: float
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1; got {self.rank}.")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be more than 0; got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be at least 0 and less than 1; got {self.dropout}.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class AdaptedLinear(nnx.Module):
    """A linear layer with an adapter: `x W + scale * dropout(x) A B` (`lora.Linear` of PEFT).

    W + scale * A B is never formed: it would cost a copy and a gradient of the size of W. W may be quantized (QLoRA,
    arXiv 2305.14314); the layer's own parameters keep their names.
    """

    def __init__(self, linear: nnx.Linear | QuantizedLinear, config: LoraConfig):
        if isinstance(linear, QuantizedLinear):
            self.codes, self.absmax = linear.codes, linear.absmax
            (wide, wide_out), dtype = kernel_shape(linear.codes), jnp.dtype(jnp.float32)
        else:
            self.kernel = linear.kernel
            (wide, wide_out), dtype = linear.kernel.shape, linear.kernel.dtype
        self.lora_a = nnx.Param(jnp.zeros((wide, config.rank), dtype))
        self.lora_b = nnx.Param(jnp.zeros((config.rank, wide_out), dtype))
        if config.dropout:
            # Not learned: every step binds a key of its own (see `dropout_keys`).
            self.lora_dropout = nnx.Param(jnp.zeros((2,), jnp.uint32))
        self.is_quantized = isinstance(linear, QuantizedLinear)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t f"]:
        thin = _drop(x, self.lora_dropout[...], self.config.dropout) if self.config.dropout else x
        whole = multiply(x, self.codes[...], self.absmax[...]) if self.is_quantized else x @ self.kernel[...]
        # Tokens on one axis; see `Linear` of layers.py.
        change = (thin.reshape(-1, x.shape[-1]) @ self.lora_a[...]) @ self.lora_b[...]
        return whole + self.config.scale * change.reshape(whole.shape)


def adapt(decoder: Llama, config: LoraConfig) -> None:
    """Puts an adapter beside every linear layer of a decoder's layers, in either form of them."""
    replace_linear_layers(decoder, functools.partial(AdaptedLinear, config=config))


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter's factors."""
    return name.endswith((A, B))


def initial_factor(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """What a factor starts from, as in PEFT: A uniform within width ** -0.5, B zero, so that nothing is added yet."""
    if name.endswith(B):
        return np.zeros(shape, np.float32)
    return rng.uniform(-(shape[0] ** -0.5), shape[0] ** -0.5, shape).astype(np.float32)


def dropout_keys(abstract: Mapping[str, Any], key: Key[Array, ""]) -> Parameters:
    """The keys that the adapters of a model need for one pass, each drawn from its own name."""
    return {
        name: jax.random.bits(jax.random.fold_in(key, zlib.crc32(name.encode())), value.shape, jnp.uint32)
        for name, value in abstract.items()
        if name.endswith(DROPOUT)
    }


def merged(values: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Parameters, layers apart, with every adapter added to its kernel, in float32 and rounded once."""
    merged = {name: value for name, value in values.items() if not is_adapter(name)}
    for name, a in values.items():
        if name.endswith(A):
            kernel = name.removesuffix(A) + ".kernel"
            b = values[name.removesuffix(A) + B]
            change = scale * (np.asarray(a, np.float32) @ np.asarray(b, np.float32))
            merged[kernel] = (np.asarray(values[kernel], np.float32) + change).astype(values[kernel].dtype)
    return merged


def _drop(x: Float[Array, "b t d"], key: Any, share: float) -> Float[Array, "b t d"]:
    # 16 bits a draw, so that the share is off by less than 1e-5.
    threshold = round(share * 2**16)
    kept = jax.random.bits(jax.random.wrap_key_data(key), x.shape, jnp.uint16) >= threshold
    return jnp.where(kept, x * (2**16 / (2**16 - threshold)), 0).astype(x.dtype)
