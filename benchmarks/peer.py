"""The peer that users have, transformers on torch, and our parameters with the very same random values."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llava_jax.convert.layouts import from_huggingface
from llava_jax.models.build import structure
from llava_jax.models.parameters import Parameters
from llava_jax.shapes import LlavaConfig, VisionConfig
from llava_jax.sizes import DEBUG, LLAVA_15_7B

# 70 million parameters; with the vocabulary that llava-hf checkpoints are padded to.
SMALL = dataclasses.replace(
    LLAVA_15_7B,
    vision=VisionConfig(
        image_size=112,
        patch_size=14,
        embed_dim=384,
        hidden_dim=1536,
        num_layers=6,
        num_heads=6,
        norm_eps=1e-5,
        activation="quick_gelu",
    ),
    text=dataclasses.replace(
        LLAVA_15_7B.text,
        vocab_size=32_064,
        num_layers=8,
        embed_dim=512,
        hidden_dim=1408,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
    ),
)
LARGE = dataclasses.replace(LLAVA_15_7B, text=dataclasses.replace(LLAVA_15_7B.text, vocab_size=32_064))
TINY = dataclasses.replace(DEBUG, text=dataclasses.replace(DEBUG.text, max_positions=4096))
SIZES = {"small": SMALL, "7b": LARGE, "tiny": TINY}
# The last id of the vocabulary, which no prompt holds otherwise.
IMAGE_ID_FROM_END = -1


def image_id(config: LlavaConfig) -> int:
    return config.text.vocab_size + IMAGE_ID_FROM_END


def make_peer(config: LlavaConfig, *, device: str, dtype: Any, **options: Any) -> Any:
    """`LlavaForConditionalGeneration` with random weights whose answers vary; attention as transformers chooses it."""
    import torch
    import transformers

    vision, text = config.vision, config.text
    theirs = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision.embed_dim,
            intermediate_size=vision.hidden_dim,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.norm_eps,
            hidden_act=vision.activation,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.embed_dim,
            intermediate_size=text.hidden_dim,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            num_key_value_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            rms_norm_eps=text.norm_eps,
            max_position_embeddings=text.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        ),
        image_token_index=image_id(config),
        vision_feature_layer=config.select_layer,
        vision_feature_select_strategy="default",
    )
    # For what is drawn below and for the rest: processes of one comparison have the same weights.
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.LlavaForConditionalGeneration._from_config(theirs, dtype=dtype, **options)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                scale = 1.0 if name.endswith("embed_tokens.weight") else value[0].numel() ** -0.5
                value.normal_(0.0, scale, generator=generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def our_parameters(peer: Any) -> Parameters:
    """Ours, with the peer's values in the peer's dtype."""
    tensors = {name: _numpy(value) for name, value in peer.state_dict().items()}
    params = {name: jnp.array(value) for name, value in from_huggingface(tensors).items()}
    return jax.block_until_ready(params)


def random_parameters(config: LlavaConfig, dtype: Any) -> Parameters:
    """Ours alone, of the same spread."""

    # Compiled once for each shape, of which there are few.
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def normal(key: Any, shape: tuple[int, ...], scale: float) -> jax.Array:
        return (scale * jax.random.normal(key, shape)).astype(dtype)

    def draw(number: int, name: str, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) < 2:
            return (jnp.ones if name.endswith(".scale") else jnp.zeros)(shape, dtype)
        scale = 1.0 if name.endswith("embed_tokens.embedding") else shape[0] ** -0.5
        return normal(jax.random.key(number), shape, scale)

    shapes = structure(config)[1]
    params = {name: draw(number, name, value.shape) for number, (name, value) in enumerate(shapes.items())}
    return jax.block_until_ready(params)


def _numpy(value: Any) -> np.ndarray:
    import torch

    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
