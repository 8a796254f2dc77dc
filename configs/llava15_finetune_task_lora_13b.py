r"""Tunes the published LLaVA-1.5-13B further with LoRA, on data of your own.

    llava-jax train --config configs/llava15_finetune_task_lora_13b.py --workdir runs/finetune_task_lora_13b \
        --set data.records=data/mine.json --set data.image_root=data/mine

It is llava15_finetune_task_13b.py, learning as llava15_finetune_lora_7b.py does. Numbers:
scripts/v1_5/finetune_task_lora.sh of the original, whose DeepSpeed config does not clip gradients.
"""

import dataclasses

from llava15_finetune_lora_7b import get_config as finetune_lora_7b
from llava15_finetune_task_13b import get_config as finetune_task_13b

from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    adapters = finetune_lora_7b()
    return dataclasses.replace(finetune_task_13b(), optim=adapters.optim, lora=adapters.lora)
