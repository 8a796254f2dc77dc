r"""LLaVA v1 stage 2: tune projector and Vicuna-7B on the 158k instructions, three epochs.

    llava-jax train --config configs/llava_v1_finetune_7b.py --workdir runs/v1_finetune_7b

Numbers: scripts/finetune_full_schedule.sh of the original, whose DeepSpeed config does not clip gradients. Its global
batch is 128; the paper (arXiv 2304.08485) says 32: `--set data.batch_records=32`.
"""

from llava_jax.data.rows import Conversations
from llava_jax.data.templates import V1
from llava_jax.sizes import LLAVA_V1_7B
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import next_token


def get_config() -> TrainConfig:
    return TrainConfig(
        model=LLAVA_V1_7B,
        objective=next_token,
        init={
            "tower": "weights/clip-vit-large-patch14",
            "decoder": "weights/vicuna-7b-v1.3",
            "projector": "runs/v1_pretrain_7b",
        },
        trainable=("projector", "decoder"),
        data=DataConfig(
            records="data/llava_instruct_158k.json",
            image_root="data/coco/train2017",
            tokenizer="weights/vicuna-7b-v1.3",
            rows=Conversations(template=V1, length=2048, tiles=7, image_mode="square", overflow="text"),
            batch_records=128,
            epochs=3,
            workers=8,
        ),
        optim=OptimConfig(learning_rate=2e-5, clip_norm=None),
        stacked=True,
        remat="everything",
        checkpoint_every=200,
    )
