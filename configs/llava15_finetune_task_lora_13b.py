r"""Tunes the published LLaVA-1.5-13B further with LoRA, on data of your own.

    llava-jax train --config configs/llava15_finetune_task_lora_13b.py --workdir runs/finetune_task_lora_13b \
        --set data.records=data/mine.json --set data.image_root=data/mine

Numbers: scripts/v1_5/finetune_task_lora.sh of the original, whose DeepSpeed config does not clip gradients.
"""

from llava_jax.data.rows import Conversations
from llava_jax.data.templates import V1
from llava_jax.models.lora import LoraConfig
from llava_jax.sizes import LLAVA_15_13B
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import next_token


def get_config() -> TrainConfig:
    return TrainConfig(
        model=LLAVA_15_13B,
        objective=next_token,
        init={
            "tower": "weights/llava-1.5-13b-hf",
            "decoder": "weights/llava-1.5-13b-hf",
            "projector": "weights/llava-1.5-13b-hf",
        },
        trainable=("projector", "decoder"),
        data=DataConfig(
            records="data/task.json",
            image_root="data",
            tokenizer="weights/llava-1.5-13b-hf",
            rows=Conversations(template=V1, length=2048, tiles=3, image_mode="pad", overflow="text"),
            batch_records=128,
            epochs=1,
            workers=8,
        ),
        optim=OptimConfig(learning_rate=2e-4, part_learning_rates={"projector": 2e-5}, clip_norm=None),
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),
        stacked=True,
        remat="everything",
        checkpoint_every=200,
    )
