"""From a shape to a network: its structure, and the values that training from nothing starts from."""

import zlib
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llava_jax.models.clip import Clip
from llava_jax.models.llava import Llava
from llava_jax.models.lora import LoraConfig, adapt
from llava_jax.models.parameters import GraphDef, Parameters, part, skeleton, stack_layers
from llava_jax.models.quantized import Scheme, quantize_layers
from llava_jax.models.streamed import stream_layers
from llava_jax.shapes import ClipConfig, LlavaConfig, ModelConfig


class _OneKey(nnx.Rngs):
    """One key for every value: none is computed, and counting keys under tracing takes ten seconds at 7B."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def structure(
    config: ModelConfig,
    *,
    stacked: bool = False,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    quantize: Scheme | None = None,
    lora: LoraConfig | None = None,
    streamed: bool = False,
) -> tuple[GraphDef, Parameters]:
    """The structure of a shape and its abstract parameters, at no cost: 34B takes no memory.

    `quantize` holds the decoder's linear layers as codes; `lora` puts adapters beside them; `streamed` holds those
    without adapters, and the head, as CPUs decode with them fastest.
    """

    def build() -> Llava | Clip:
        # The values that modules make for themselves are never computed; see `initial_value`.
        match config:
            case LlavaConfig():
                model = Llava(config, stacked=stacked, param_dtype=param_dtype, rngs=_OneKey(0))
                if quantize is not None:
                    quantize_layers(model.decoder, quantize)
                if lora is not None:
                    adapt(model.decoder, lora)
                if streamed:
                    stream_layers(model.decoder)
                return model
            case ClipConfig():
                return Clip(config, stacked=stacked, param_dtype=param_dtype, rngs=_OneKey(0))

    graphdef, values = skeleton(build)
    if stacked:
        # Built with one layer of each run; what it is bound to has all of them.
        values = jax.eval_shape(
            stack_layers, structure(config, param_dtype=param_dtype, quantize=quantize, lora=lora)[1]
        )
    return graphdef, values


def random_parameters(config: ModelConfig, parts: Collection[str], *, seed: int) -> dict[str, np.ndarray]:
    """Float32 starting values of the named parts, layers apart.

    Each depends on the seed and its path alone: not on the other parts, nor on devices or hosts.
    """
    shapes = {name: value.shape for name, value in structure(config)[1].items() if part(name) in parts}

    def draw(name: str) -> np.ndarray:
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        if part(name) != "projector":
            return initial_value(name, shapes[name], rng)
        # What `torch.nn.Linear` starts from, and so the original's projector: kernel and bias alike.
        bound = shapes[name.replace(".bias", ".kernel")][0] ** -0.5
        return rng.uniform(-bound, bound, shapes[name]).astype(np.float32)

    return {name: draw(name) for name in shapes}


def initial_value(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """What a parameter of this name starts from: the customary values of CLIP, Llama and linear layers."""
    if name == "logit_scale":
        # ln(1 / 0.07), the temperature that CLIP starts from (arXiv 2103.00020, section 2.5).
        return np.full(shape, 2.6592, np.float32)
    if name.endswith(".scale"):
        return np.ones(shape, np.float32)
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    # The width to the power -1/2, so that a token's own embedding is not drowned by what the first layer adds. At
    # 4096 that is the customary 0.02; at the quickstart's width 0.02 would cost most of its training time.
    width = shape[0] if name.endswith(".kernel") else shape[-1]
    return (width**-0.5 * rng.standard_normal(shape, np.float32)).astype(np.float32)
