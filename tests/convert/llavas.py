"""Small checkpoints on disk as others write them, from one random model of transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

from llava_jax.convert.config_json import vision_fields
from tests.models import oracle
from tests.tiny import LLAVA, VISION

NEXT_PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def make_huggingface(folder: Path, *, is_next: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A random `llava` or `llava_next` that transformers saved, with a padded vocabulary."""
    config = oracle.llava_config(LLAVA)
    cls: Any = transformers.LlavaForConditionalGeneration
    if is_next:
        values = config.to_dict() | {"model_type": "llava_next", "image_grid_pinpoints": NEXT_PINPOINTS}
        config = transformers.LlavaNextConfig(**values)
        cls = transformers.LlavaNextForConditionalGeneration
    model = oracle.make(cls, config, seed=3).to(dtype)
    model.save_pretrained(folder)
    return model


def numpy_of(state: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Tensors in numpy, bfloat16 kept."""
    found = {}
    for key, tensor in state.items():
        value = tensor.detach().contiguous()
        is_brain = value.dtype == torch.bfloat16
        found[key] = value.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_brain else value.numpy()
    return found


def rename(state: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Keys of L3, which version 5 has in memory, in the layouts of other versions and in the original's."""
    prefixes = {
        "L1": ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", "", ""),
        "L2": ("model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model.", "model."),
        "L3": ("model.language_model.", "lm_head.", "model.vision_tower.", "model.", "model."),
        "L4": ("language_model.model.", "language_model.lm_head.", "vision_tower.", "", ""),
        "original": ("model.", "lm_head.", "model.vision_tower.vision_tower.vision_model.", "", "model."),
    }[layout]
    decoder, head, tower, projector, newline = prefixes
    renamed = {}
    for key, value in state.items():
        new = key.replace("model.vision_tower.", tower) if key.startswith("model.vision_tower.") else key
        if key.startswith("model.language_model."):
            new = key.replace("model.language_model.", decoder)
        elif key.startswith("lm_head."):
            new = key.replace("lm_head.", head)
        elif key.startswith("model.multi_modal_projector."):
            new = key.replace("model.multi_modal_projector.", f"{projector}multi_modal_projector.")
            if layout == "original":
                new = new.replace("multi_modal_projector.linear_1", "model.mm_projector.0")
                new = new.replace("multi_modal_projector.linear_2", "model.mm_projector.2")
        elif key == "model.image_newline":
            new = f"{newline}image_newline"
        renamed[new] = value
    assert len(renamed) == len(state)
    return renamed


def original_config(**changed: Any) -> dict[str, Any]:
    """The original's config of the small model; its tower lies in `clip/` beside it."""
    text = oracle.llama_config(LLAVA.text).to_dict()
    return text | {
        "model_type": "llava_llama",
        "rope_parameters": None,
        "rope_theta": LLAVA.text.rope_theta,
        "mm_vision_tower": "clip",
        "mm_hidden_size": VISION.embed_dim,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "tokenizer_model_max_length": 512,
        **changed,
    }


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


def write_tower(folder: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """The tower of L3 tensors, alone, as CLIPVisionModel had it."""
    prefix = "model.vision_tower."
    alone = {f"vision_model.{key.removeprefix(prefix)}": v for key, v in tensors.items() if key.startswith(prefix)}
    return write_folder(folder, vision_fields(VISION), alone)
