r"""LLaVA-1.5 stage 2 with LoRA: adapters on every linear layer of Vicuna-13B, and the whole projector at its own rate.

    llava-jax train --config configs/llava15_finetune_lora_13b.py --workdir runs/finetune_lora_13b

Numbers: scripts/v1_5/finetune_lora.sh of the original, whose DeepSpeed config does not clip gradients.
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
            "tower": "weights/clip-vit-large-patch14-336",
            "decoder": "weights/vicuna-13b-v1.5",
            "projector": "runs/pretrain_13b",
        },
        trainable=("projector", "decoder"),
        data=DataConfig(
            records="data/llava_v1_5_mix665k.json",
            image_root="data",
            tokenizer="weights/vicuna-13b-v1.5",
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
