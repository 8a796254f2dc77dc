"""Folders of a LoRA adapter and of what was trained beside it, as the original and PEFT read them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from llava_jax.convert.layouts import to_layout
from llava_jax.convert.tensor import Tensor
from llava_jax.convert.torch_zip import write_torch_zip
from llava_jax.errors import CheckpointError
from llava_jax.models.lora import LoraConfig, is_adapter
from llava_jax.models.parameters import part
from llava_jax.shapes import LlavaConfig

Names = Literal["original", "hf", "hf-4.51"]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Where the adapted model keeps its decoder, and what comes before its projector. transformers 4.52 moved LLaVA's.
_DECODER: dict[Names, str] = {"original": "model", "hf": "model.language_model", "hf-4.51": "language_model.model"}
_PROJECTOR: dict[Names, str] = {"hf": "model.", "hf-4.51": ""}


def write_adapter(
    folder: Path,
    trained: Mapping[str, Tensor],
    lora: LoraConfig,
    model: LlavaConfig,
    *,
    base: str,
    names: Names = "original",
) -> None:
    """Writes what a run with adapters trained, for `base`, the name or folder of the model that it belongs to.

    The original (`PeftModel.from_pretrained` after `non_lora_trainables.bin` in `llava/model/builder.py`) reads
    `original`, and needs the model's config.json beside it; PEFT on transformers' LLaVA reads `hf`, before transformers
    4.52 `hf-4.51`, where the projector is one of its `modules_to_save`.

    Raises:
      CheckpointError: nothing is an adapter; something was trained that the names of transformers have no place for.
    """
    adapters, beside = _apart(trained, model, names)
    if not adapters:
        raise CheckpointError("Only a run with adapters can be written as one; this has none. Write the whole model.")
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
        # Towers have layers of these names too.
        "target_modules": rf"{re.escape(_DECODER[names])}\.layers\..*\.({'|'.join(LINEAR)})",
        "modules_to_save": None if names == "original" or not beside else ["multi_modal_projector"],
    }
    if names == "original":
        write_torch_zip(folder / "non_lora_trainables.bin", beside)
    else:
        adapters |= beside
    from safetensors.numpy import save_file

    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _apart(
    trained: Mapping[str, Tensor], model: LlavaConfig, names: Names
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Factors, and whole parameters, by the keys that PEFT's wrapper gives them."""
    adapters: dict[str, np.ndarray] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in trained.items():
        if is_adapter(name):
            stem, _, side = name.rpartition(".lora_")
            module = stem.replace("decoder", _DECODER[names], 1)
            adapters[f"base_model.model.{module}.lora_{side.upper()}.weight"] = np.ascontiguousarray(tensor.view().T)
        else:
            whole[name] = tensor
    if names == "original":
        prefix, layout = "", "original"
    else:
        prefix, layout = _PROJECTOR[names], "huggingface"
        others = sorted(name for name in whole if part(name) != "projector")
        if others:
            raise CheckpointError(
                f"Beside its adapters PEFT keeps a projector alone; {', '.join(others[:4])} was trained here too. "
                "Write --to lora, or --to hf with the adapters merged."
            )
    keys = to_layout(whole, layout, model).items()
    return adapters, {f"base_model.model.{prefix}{key}": np.ascontiguousarray(tensor.view()) for key, tensor in keys}
