"""CLIP: the vision tower that LLaVA looks through, the text tower, and the pair of them."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt8

from llava_jax.models.attention import ATTENTION, Attend, Constrain, Scope, attend_xla, unconstrained
from llava_jax.models.layers import Embed, LayerNorm, Linear, Remat, make_layers, run_layers
from llava_jax.shapes import Activation, CaptionConfig, ClipConfig, FeatureSelect, VisionConfig

# OpenAI's statistics of red, green and blue (`OPENAI_CLIP_MEAN`, `OPENAI_CLIP_STD` of transformers).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(
    images: UInt8[Array, "n height width 3"], dtype: jax.typing.DTypeLike
) -> Float[Array, "n height width 3"]:
    """Grey levels to the units that CLIP was trained on; runs on the device, so that hosts ship bytes."""
    pixels = images.astype(jnp.float32) / 255
    return ((pixels - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)).astype(dtype)


def activate(x: Float[Array, "*axes"], activation: Activation) -> Float[Array, "*axes"]:
    """`quick_gelu` is x * sigmoid(1.702 x), which OpenAI's CLIP was trained with; `gelu` is the exact one."""
    if activation == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=False)


class ClipAttention(nnx.Module):
    """Multi-head self-attention with biases (`CLIPAttention` of transformers)."""

    def __init__(self, embed_dim: int, num_heads: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(Linear, embed_dim, embed_dim, param_dtype=param_dtype, rngs=rngs)
        self.q_proj = linear()
        self.k_proj = linear()
        self.v_proj = linear()
        self.out_proj = linear()
        self.num_heads = num_heads

    def __call__(self, x: Float[Array, "b t e"], scope: Scope, attend: Attend) -> Float[Array, "b t e"]:
        b, t, e = x.shape
        q, k, v = (
            project(x).reshape(b, t, self.num_heads, e // self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(checkpoint_name(attend(q, k, v, scope), ATTENTION).reshape(b, t, e))


class ClipMlp(nnx.Module):
    """Two linear layers with CLIP's activation between them (`CLIPMLP` of transformers)."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: Activation,
        *,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.fc1 = Linear(embed_dim, hidden_dim, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = Linear(hidden_dim, embed_dim, param_dtype=param_dtype, rngs=rngs)
        self.activation: Activation = activation

    def __call__(self, x: Float[Array, "b t e"]) -> Float[Array, "b t e"]:
        return self.fc2(activate(self.fc1(x), self.activation))


class ClipLayer(nnx.Module):
    """One pre-norm transformer layer (`CLIPEncoderLayer` of transformers)."""

    def __init__(self, config: VisionConfig | CaptionConfig, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.embed_dim, config.norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.self_attn = ClipAttention(config.embed_dim, config.num_heads, param_dtype=param_dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.embed_dim, config.norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.mlp = ClipMlp(config.embed_dim, config.hidden_dim, config.activation, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t e"], scope: Scope, attend: Attend) -> Float[Array, "b t e"]:
        x = x + self.self_attn(self.layer_norm1(x), scope, attend)
        return x + self.mlp(self.layer_norm2(x))


class ClipTower(nnx.Module):
    """CLIP's vision transformer (`CLIPVisionTransformer` of transformers).

    The last layer and the post-norm are kept although LLaVA reads the layer before: contrastive training needs
    them, and an export without them would lose tensors of the checkpoint.
    """

    def __init__(self, config: VisionConfig, *, stacked: bool, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        e, p = config.embed_dim, config.patch_size
        self.patch_embedding = Linear(p * p * 3, e, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.class_embedding = nnx.Param(jnp.zeros((e,), param_dtype))
        self.position_embedding = nnx.Param(jnp.zeros((1 + config.num_patches, e), param_dtype))
        self.pre_layernorm = LayerNorm(config.embed_dim, config.norm_eps, param_dtype=param_dtype, rngs=rngs)
        make = functools.partial(ClipLayer, config, param_dtype=param_dtype, rngs=rngs)
        self.layers = make_layers(make, config.num_layers, stacked=stacked)
        self.num_layers = config.num_layers
        self.post_layernorm = LayerNorm(config.embed_dim, config.norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.patch_size = p

    def hidden(
        self,
        images: UInt8[Array, "n height width 3"],
        *,
        depth: int | None = None,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> Float[Array, "n p e"]:
        """The hidden state after `depth` layers (all of them by default), class token first, no post-norm."""
        kernel = self.patch_embedding.kernel
        n, height, width, _ = images.shape
        rows, columns, size = height // self.patch_size, width // self.patch_size, self.patch_size
        pixels = normalise(images, kernel.dtype).reshape(n, rows, size, columns, size, 3)
        patches = self.patch_embedding(pixels.swapaxes(2, 3).reshape(n, rows * columns, size * size * 3))
        classes = jnp.broadcast_to(self.class_embedding[...], (n, 1, patches.shape[-1])).astype(patches.dtype)
        x = jnp.concatenate([classes, patches], axis=1)
        x = (x + self.position_embedding[...][None]).astype(x.dtype)

        def step(layer: ClipLayer, x: Float[Array, "n p e"]) -> Float[Array, "n p e"]:
            return constrain(layer(x, Scope(), attend))

        return run_layers(self.layers, constrain(self.pre_layernorm(x)), step, depth=depth, remat=remat)

    def features(
        self,
        images: UInt8[Array, "n height width 3"],
        *,
        depth: int,
        select: FeatureSelect,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> Float[Array, "n p e"]:
        """What LLaVA reads: the hidden state after `depth` layers, with (`cls_patch`) or without the class token."""
        hidden = self.hidden(images, depth=depth, attend=attend, constrain=constrain, remat=remat)
        return hidden if select == "cls_patch" else hidden[:, 1:]

    def pooled(
        self,
        images: UInt8[Array, "n height width 3"],
        *,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> Float[Array, "n e"]:
        """The normed class token after the last layer (`pooler_output` of transformers)."""
        hidden = self.hidden(images, attend=attend, constrain=constrain, remat=remat)
        return self.post_layernorm(hidden[:, 0])


class ClipCaption(nnx.Module):
    """CLIP's causal text transformer (`CLIPTextTransformer` of transformers)."""

    def __init__(self, config: CaptionConfig, *, stacked: bool, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        e = config.embed_dim
        self.token_embedding = Embed(config.vocab_size, e, param_dtype=param_dtype, rngs=rngs)
        self.position_embedding = nnx.Param(jnp.zeros((config.context_length, e), param_dtype))
        make = functools.partial(ClipLayer, config, param_dtype=param_dtype, rngs=rngs)
        self.layers = make_layers(make, config.num_layers, stacked=stacked)
        self.final_layer_norm = LayerNorm(config.embed_dim, config.norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.eos_id = config.eos_id

    def pooled(
        self,
        tokens: Int[Array, "n t"],
        *,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> Float[Array, "n e"]:
        """The normed hidden state at each caption's first end-of-sequence token."""
        n, t = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(t), (n, t))
        scope = Scope(query_positions=positions, key_positions=positions, causal=True)
        x = self.token_embedding(tokens)
        x = (x + self.position_embedding[:t][None]).astype(x.dtype)
        x = run_layers(self.layers, constrain(x), lambda layer, x: constrain(layer(x, scope, attend)), remat=remat)
        ends = jnp.argmax(tokens == self.eos_id, axis=1)
        return self.final_layer_norm(jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0])


class Clip(nnx.Module):
    """Both towers, projected into one space (`CLIPModel` of transformers)."""

    def __init__(self, config: ClipConfig, *, stacked: bool, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.tower = ClipTower(config.vision, stacked=stacked, param_dtype=param_dtype, rngs=rngs)
        self.caption = ClipCaption(config.caption, stacked=stacked, param_dtype=param_dtype, rngs=rngs)
        linear = functools.partial(Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.visual_projection = linear(config.vision.embed_dim, config.projection_dim)
        self.text_projection = linear(config.caption.embed_dim, config.projection_dim)
        self.logit_scale = nnx.Param(jnp.zeros((), param_dtype))

    def __call__(
        self,
        images: UInt8[Array, "n height width 3"],
        tokens: Int[Array, "n t"],
        *,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> tuple[Float[Array, "n c"], Float[Array, "n c"]]:
        """Unit vectors of the images and of the captions."""
        image = self.visual_projection(self.tower.pooled(images, attend=attend, constrain=constrain, remat=remat))
        return unit(image), self.embed_captions(tokens, attend=attend, constrain=constrain, remat=remat)

    def embed_captions(
        self,
        tokens: Int[Array, "n t"],
        *,
        attend: Attend = attend_xla,
        constrain: Constrain = unconstrained,
        remat: Remat = None,
    ) -> Float[Array, "n c"]:
        """Unit vectors of the captions."""
        pooled = self.caption.pooled(tokens, attend=attend, constrain=constrain, remat=remat)
        return unit(self.text_projection(pooled))


def unit(x: Float[Array, "n c"]) -> Float[Array, "n c"]:
    """Vectors of length one."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
