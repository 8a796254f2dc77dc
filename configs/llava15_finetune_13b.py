r"""LLaVA-1.5 stage 2 with Vicuna-13B; all else is llava15_finetune_7b.py.

llava-jax train --config configs/llava15_finetune_13b.py --workdir runs/finetune_13b
"""

import dataclasses

from llava15_finetune_7b import get_config as finetune_7b

from llava_jax.sizes import LLAVA_15_13B
from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    base = finetune_7b()
    return dataclasses.replace(
        base,
        model=LLAVA_15_13B,
        init={**base.init, "decoder": "weights/vicuna-13b-v1.5", "projector": "runs/pretrain_13b"},
        data=dataclasses.replace(base.data, tokenizer="weights/vicuna-13b-v1.5"),
    )
