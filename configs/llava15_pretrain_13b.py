r"""LLaVA-1.5 stage 1 with Vicuna-13B; all else is llava15_pretrain_7b.py.

llava-jax train --config configs/llava15_pretrain_13b.py --workdir runs/pretrain_13b
"""

import dataclasses

from llava15_pretrain_7b import get_config as pretrain_7b

from llava_jax.sizes import LLAVA_15_13B
from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    base = pretrain_7b()
    return dataclasses.replace(
        base,
        model=LLAVA_15_13B,
        init={**base.init, "decoder": "weights/vicuna-13b-v1.5"},
        data=dataclasses.replace(base.data, tokenizer="weights/vicuna-13b-v1.5"),
    )
