r"""LLaVA-1.5 stage 2 with LoRA: adapters on every linear layer of Vicuna-7B, and the whole projector at its own rate.

    llava-jax train --config configs/llava15_finetune_lora_7b.py --workdir runs/finetune_lora_7b

All else is llava15_finetune_7b.py. Numbers: scripts/v1_5/finetune_lora.sh of the original, whose DeepSpeed config does
not clip gradients.
"""

import dataclasses

from llava15_finetune_7b import get_config as finetune_7b

from llava_jax.models.lora import LoraConfig
from llava_jax.train.config import OptimConfig, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        finetune_7b(),
        optim=OptimConfig(learning_rate=2e-4, part_learning_rates={"projector": 2e-5}, clip_norm=None),
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),
    )
