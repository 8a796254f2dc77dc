"""The projector: from the tower's width to the decoder's."""

import functools

import jax
from flax import nnx
from jaxtyping import Array, Float

from llava_jax.models.layers import Linear


class Projector(nnx.Module):
    """`identity`, `linear` or `mlpNx_gelu`: linear layers with the exact GELU between them.

    Source: `build_vision_projector` in `llava/model/multimodal_projector/builder.py` of the original.
    """

    def __init__(
        self, vision_dim: int, text_dim: int, depth: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        linear = functools.partial(Linear, param_dtype=param_dtype, rngs=rngs)
        widths = [vision_dim] + [text_dim] * depth
        self.linear = nnx.List([linear(wide, wide_out) for wide, wide_out in zip(widths, widths[1:], strict=False)])

    def __call__(self, features: Float[Array, "n p e"]) -> Float[Array, "n p d"]:
        x = features
        for i, layer in enumerate(self.linear):
            x = layer(x if i == 0 else jax.nn.gelu(x, approximate=False))
        return x
