r"""The toy of debug_cpu.py with LoRA: the decoder learns through adapters, random as it is.

llava-jax train --config configs/debug_lora.py --workdir runs/debug_lora
"""

import dataclasses

from debug_cpu import get_config as debug_cpu

from llava_jax.models.lora import LoraConfig
from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(debug_cpu(), lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05))
