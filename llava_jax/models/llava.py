"""LLaVA: tower, projector and decoder, joined by a static-shape scatter."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from llava_jax.models.attention import Attend, Constrain, attend_xla, unconstrained
from llava_jax.models.clip import ClipTower
from llava_jax.models.layers import Remat
from llava_jax.models.llama import Llama
from llava_jax.models.projector import Projector
from llava_jax.shapes import LlavaConfig


def place_features(
    x: Float[Array, "b t d"],
    features: Float[Array, "b i p d"],
    patch_slots: Int[Array, "b i p"],
) -> Float[Array, "b t d"]:
    """Writes every patch feature into its slot of its own row.

    Slots are computed on the host and are row-local, so the scatter needs no communication. A patch that lands
    nowhere has a slot of its own past the row's end and is dropped; never -1, which would wrap to the last slot.

    Example, one row of four slots, one tile of two patches and an empty tile (slots 4 and 5):

        x = [a, b, c, d], features = [[A, B], [X, Y]], patch_slots = [[1, 2], [4, 5]]   ->   [a, A, B, d]
    """
    b, _, _, d = features.shape

    def place(row: Float[Array, "t d"], new: Float[Array, "n d"], slots: Int[Array, " n"]) -> Float[Array, "t d"]:
        return row.at[slots].set(new, mode="drop", unique_indices=True)

    return jax.vmap(place)(x, features.reshape(b, -1, d).astype(x.dtype), patch_slots.reshape(b, -1))


class Llava(nnx.Module):
    """The composition of Liu et al. (arXiv 2304.08485, 2310.03744) over packed rows."""

    def __init__(self, config: LlavaConfig, *, stacked: bool, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.tower = ClipTower(config.vision, stacked=stacked, param_dtype=param_dtype, rngs=rngs)
        self.projector = Projector(
            config.vision.embed_dim,
            config.text.embed_dim,
            config.projector_depth,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.decoder = Llama(config.text, stacked=stacked, param_dtype=param_dtype, rngs=rngs)
        if config.image_newline:
            self.image_newline = nnx.Param(jnp.zeros((config.text.embed_dim,), param_dtype))
        self.config = config

    def embed(
        self,
        tokens: Int[Array, "b t"],
        images: UInt8[Array, "b i height width 3"],
        patch_slots: Int[Array, "b i p"],
        is_newline: Bool[Array, "b t"] | None = None,
        *,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> Float[Array, "b t d"]:
        """Token embeddings with the pictures' features and newlines written over their slots.

        The tower's tiles are constrained too: left alone, XLA runs the tower over the whole batch on every device.
        """
        x = constrain(self.decoder.embed_tokens(tokens))
        b, i, *pixels = images.shape
        if i == 0:
            return x
        if is_newline is not None:
            # A mask, not a second scatter: where newlines fall needs no list of static size, and it fuses.
            x = jnp.where(is_newline[..., None], self.image_newline[...], x).astype(x.dtype)
        features = self.tower.features(
            images.reshape(b * i, *pixels),
            depth=self.config.tower_depth,
            select=self.config.select_feature,
            attend=attend,
            constrain=constrain,
            remat=remat,
        )
        projected = constrain(self.projector(features))
        return place_features(x, projected.reshape(b, i, *projected.shape[1:]), patch_slots)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        images: UInt8[Array, "b i height width 3"],
        patch_slots: Int[Array, "b i p"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        is_newline: Bool[Array, "b t"] | None = None,
        *,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> Float[Array, "b t d"]:
        """Normed hidden states of packed rows; `decoder.head()` turns them into logits."""
        x = self.embed(tokens, images, patch_slots, is_newline, attend=attend, constrain=constrain, remat=remat)
        return self.decoder(x, positions, segment_ids, attend=attend, constrain=constrain, remat=remat)
