r"""LLaVA v1 stage 1: align CLIP at 224 pixels with Vicuna-7B through one linear layer, on 595k captions.

    llava-jax train --config configs/llava_v1_pretrain_7b.py --workdir runs/v1_pretrain_7b

Numbers: scripts/pretrain.sh of the original, whose DeepSpeed config does not clip gradients. A picture takes 256 slots.
For 13B exchange LLAVA_V1_13B and weights/vicuna-13b-v1.3.
"""

import dataclasses

from llava15_pretrain_7b import get_config as pretrain_7b

from llava_jax.sizes import LLAVA_V1_7B
from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    base = pretrain_7b()
    return dataclasses.replace(
        base,
        model=LLAVA_V1_7B,
        init={
            "tower": "weights/clip-vit-large-patch14",
            "decoder": "weights/vicuna-7b-v1.3",
            "projector": "random",
        },
        data=dataclasses.replace(
            base.data,
            records="data/cc3m_595k_chat.json",
            image_root="data/CC3M-595K",
            tokenizer="weights/vicuna-7b-v1.3",
            rows=dataclasses.replace(base.data.rows, length=2048, tiles=7),
            batch_records=128,
        ),
        optim=dataclasses.replace(base.optim, learning_rate=2e-3),
        accumulation=1,
    )
