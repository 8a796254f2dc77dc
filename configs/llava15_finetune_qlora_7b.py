r"""LLaVA-1.5 stage 2 with QLoRA on one GPU of 24 GB: adapters on Vicuna-7B in 4 bits, and the whole projector.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
    llava-jax train --config configs/llava15_finetune_qlora_7b.py --workdir runs/finetune_qlora_7b

Numbers: scripts/v1_5/finetune_lora.sh of the original (its only QLoRA script is of v1), on linear layers in nf4 with
float32 scales; it would quantize the scales too. Memory, by arithmetic, not measured on such a GPU:

    nf4 codes of 6,476,005,376 weights, half a byte each       3.02 GiB
    their scales, 4 bytes for 64 weights                       0.38 GiB
    embedding, head (262 M) and tower (304 M) in bfloat16      1.05 GiB
    factors (320 M) and projector (21 M) in float32            1.27 GiB
    their Adam moments                                         2.54 GiB
    their gradients, summed and new, and a bfloat16 copy       2.54 GiB
    what enters each of 32 layers, 2 rows of 2048 tokens       1.00 GiB
    one layer while it is redone, its weights in bfloat16      about 4 GiB
    together                                                   about 16 GiB

The rest is for what the compiler adds. Layers are apart, since a stack would be copied whole to be saved.
"""

from llava_jax.data.rows import Conversations
from llava_jax.data.templates import V1
from llava_jax.models.lora import LoraConfig
from llava_jax.sizes import LLAVA_15_7B
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import next_token


def get_config() -> TrainConfig:
    return TrainConfig(
        model=LLAVA_15_7B,
        objective=next_token,
        init={
            "tower": "weights/clip-vit-large-patch14-336",
            "decoder": "weights/vicuna-7b-v1.5",
            "projector": "runs/pretrain_7b",
        },
        trainable=("projector", "decoder"),
        data=DataConfig(
            records="data/llava_v1_5_mix665k.json",
            image_root="data",
            tokenizer="weights/vicuna-7b-v1.5",
            rows=Conversations(template=V1, length=2048, tiles=3, image_mode="pad", overflow="text"),
            batch_records=128,
            epochs=1,
            workers=8,
        ),
        optim=OptimConfig(learning_rate=2e-4, part_learning_rates={"projector": 2e-5}, clip_norm=None),
        quantize="nf4",
        lora=LoraConfig(rank=128, alpha=256.0, dropout=0.05),
        accumulation=64,
        remat="everything",
        checkpoint_every=200,
    )
