r"""LLaVA-1.5 stage 2 with LoRA on Vicuna-13B: llava15_finetune_13b.py, learning as llava15_finetune_lora_7b.py does.

llava-jax train --config configs/llava15_finetune_lora_13b.py --workdir runs/finetune_lora_13b
"""

import dataclasses

from llava15_finetune_13b import get_config as finetune_13b
from llava15_finetune_lora_7b import get_config as finetune_lora_7b

from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    adapters = finetune_lora_7b()
    return dataclasses.replace(finetune_13b(), optim=adapters.optim, lora=adapters.lora)
