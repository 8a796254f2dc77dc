"""Folders of a LoRA adapter and the projector trained beside it, as the original and PEFT read them."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_jax.convert.torch_zip import write_torch_zip
from llava_jax.errors import UserError
from llava_jax.models.lora import A, B, LoraConfig

Names = Literal["original", "hf", "hf-4.51"]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Where the adapted model keeps its decoder and its projector. transformers 4.52 moved LLaVA's.
_DECODER: dict[Names, str] = {"original": "model", "hf": "model.language_model", "hf-4.51": "language_model.model"}
_PROJECTOR: dict[Names, str] = {
    "original": "model.mm_projector",
    "hf": "model.multi_modal_projector",
    "hf-4.51": "multi_modal_projector",
}


def write_lora_folder(
    folder: str, params: Mapping[str, Any], lora: LoraConfig, *, base: str, names: Names = "original"
) -> None:
    """Writes adapters and projector, layers apart, for `base`, the name or folder of the model that they belong to.

    The original (`PeftModel.from_pretrained` after `non_lora_trainables.bin` in `llava/model/builder.py`) reads
    `original`; PEFT on transformers' LLaVA reads `hf`, before transformers 4.52 `hf-4.51`, where the projector is
    one of its `modules_to_save`. The original also needs the model's `config.json` in the folder.
    """
    target = Path(folder)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"An adapter is written into an empty folder; {folder!r} is not. Name another.")
    target.mkdir(parents=True, exist_ok=True)
    adapters: dict[str, np.ndarray] = {}
    beside: dict[str, np.ndarray] = {}
    for name, value in params.items():
        array = np.asarray(value)
        if name.endswith((A, B)):
            stem = name[: -len(A)].replace("decoder", _DECODER[names], 1)
            adapters[f"base_model.model.{stem}.lora_{name[-1].upper()}.weight"] = np.ascontiguousarray(array.T)
        elif name.startswith("projector."):
            beside[f"base_model.model.{_projector_name(name, names)}"] = np.ascontiguousarray(array.T)
    if not adapters:
        raise UserError("Only a run with adapters can be written as adapters; this one has none. Write the model.")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        # The towers of transformers' LLaVA have layers of these names too; the original adapts before it has one.
        "target_modules": list(LINEAR)
        if names == "original"
        else rf".*{re.escape(_DECODER[names])}\.layers\..*\.({'|'.join(LINEAR)})",
        "modules_to_save": None if names == "original" or not beside else ["multi_modal_projector"],
    }
    if names == "original":
        write_torch_zip(target / "non_lora_trainables.bin", beside)
    else:
        adapters |= beside
    from safetensors.numpy import save_file

    save_file(adapters, target / "adapter_model.safetensors", metadata={"format": "pt"})
    temporary = target / "adapter_config.json.tmp"
    temporary.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(temporary, target / "adapter_config.json")


def _projector_name(name: str, names: Names) -> str:
    """`projector.linear.1.kernel` is linear layer 1: module 2 of the original's sequence, whose GELUs count."""
    _, _, number, leaf = name.split(".")
    module = str(2 * int(number)) if names == "original" else f"linear_{int(number) + 1}"
    return f"{_PROJECTOR[names]}.{module}.{'weight' if leaf == 'kernel' else 'bias'}"
