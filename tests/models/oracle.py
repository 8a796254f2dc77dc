"""The reference: tiny random models of transformers on the CPU, and their tensors under our names."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
import transformers

from llava_jax.convert.layouts import from_huggingface
from llava_jax.models.build import structure
from llava_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from llava_jax.models.parameters import bind
from llava_jax.shapes import (
    CaptionConfig,
    ClipConfig,
    LinearScaling,
    Llama3Scaling,
    LlavaConfig,
    RopeScaling,
    TextConfig,
    VisionConfig,
)

IMAGE_ID = 319


def llama_config(config: TextConfig) -> transformers.PreTrainedConfig:
    """`LlamaConfig`, or `MistralConfig` where there is a sliding window."""
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {**_scaling(config.rope_scaling), "rope_theta": config.rope_theta},
    }
    if config.sliding_window is None:
        return transformers.LlamaConfig(**shape)
    return transformers.MistralConfig(**shape, sliding_window=config.sliding_window)


def _scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    match scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_positions,
            }


def _tower(config: VisionConfig | CaptionConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.embed_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
    }


def _vision(config: VisionConfig) -> dict[str, Any]:
    return {**_tower(config), "image_size": config.image_size, "patch_size": config.patch_size}


def clip_config(config: ClipConfig) -> transformers.CLIPConfig:
    caption = {
        **_tower(config.caption),
        "vocab_size": config.caption.vocab_size,
        "max_position_embeddings": config.caption.context_length,
        "bos_token_id": 0,
        "eos_token_id": config.caption.eos_id,
    }
    return transformers.CLIPConfig(
        vision_config=_vision(config.vision), text_config=caption, projection_dim=config.projection_dim
    )


def llava_config(config: LlavaConfig) -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_vision(config.vision)),
        text_config=llama_config(config.text),
        image_token_index=IMAGE_ID,
        projector_hidden_act="gelu",
        vision_feature_layer=config.select_layer,
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[config.select_feature],
    )


def make(cls: type, config: transformers.PreTrainedConfig, *, seed: int) -> Any:
    """A model with every parameter random, biases and norms too: zeros and ones would hide a wrong name."""
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name == "logit_scale":
                value.fill_(1.3)
            elif value.ndim == 1:
                value.copy_(0.2 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            elif "embedding" in name and value.ndim == 2:
                value.copy_(0.3 * noise)
            else:
                value.copy_(noise * value[0].numel() ** -0.5)
    return model.eval()


def state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's state dict in numpy; a tied head is left out, as `save_pretrained` does."""
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    return tensors


def ours(config: LlavaConfig | ClipConfig, tensors: Mapping[str, np.ndarray]) -> Any:
    """Our model with the reference's parameters, all of them."""
    params = from_huggingface(tensors)
    graphdef, expected = structure(config)
    assert set(params) == set(expected)
    return bind(graphdef, {name: jax.numpy.asarray(value) for name, value in params.items()})


def pixels(images: np.ndarray) -> torch.Tensor:
    """What the reference's image processor makes of RGB bytes, NHWC to NCHW."""
    normal = (images.astype(np.float64) / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    return torch.tensor(normal.transpose(0, 3, 1, 2), dtype=torch.float32)


def error(found: Any, expected: Any) -> float:
    """Largest difference over largest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
