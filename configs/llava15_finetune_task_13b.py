r"""Tunes the published LLaVA-1.5-13B further, on data of your own; all else is llava15_finetune_13b.py.

    llava-jax train --config configs/llava15_finetune_task_13b.py --workdir runs/finetune_task_13b \
        --set data.records=data/mine.json --set data.image_root=data/mine

Numbers: scripts/v1_5/finetune_task.sh of the original, whose DeepSpeed config does not clip gradients.
"""

import dataclasses

from llava15_finetune_13b import get_config as finetune_13b

from llava_jax.train.config import TrainConfig

# liuhaotian/llava-v1.5-13b, which leaves the tower to openai/clip-vit-large-patch14-336.
PUBLISHED = "weights/llava-v1.5-13b"


def get_config() -> TrainConfig:
    base = finetune_13b()
    return dataclasses.replace(
        base,
        init={**base.init, "projector": PUBLISHED, "decoder": PUBLISHED},
        data=dataclasses.replace(base.data, records="data/task.json", tokenizer=PUBLISHED),
    )
