r"""LLaVA v1 stage 2: tune projector and Vicuna-7B on the 158k instructions, three epochs.

    llava-jax train --config configs/llava_v1_finetune_7b.py --workdir runs/v1_finetune_7b

Numbers: scripts/finetune_full_schedule.sh of the original, whose DeepSpeed config does not clip gradients. Its global
batch is 128; the paper (arXiv 2304.08485) says 32: `--set data.batch_records=32`.
"""

import dataclasses

from llava15_finetune_7b import get_config as finetune_7b

from llava_jax.sizes import LLAVA_V1_7B
from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    base = finetune_7b()
    return dataclasses.replace(
        base,
        model=LLAVA_V1_7B,
        init={
            "tower": "weights/clip-vit-large-patch14",
            "decoder": "weights/vicuna-7b-v1.3",
            "projector": "runs/v1_pretrain_7b",
        },
        data=dataclasses.replace(
            base.data,
            records="data/llava_instruct_158k.json",
            image_root="data/coco/train2017",
            tokenizer="weights/vicuna-7b-v1.3",
            rows=dataclasses.replace(base.data.rows, tiles=7, image_mode="square"),
            epochs=3,
        ),
    )
