r"""LLaVA-1.5 stage 2 on one H200: tune projector and Vicuna-7B on the 665k mix; the tower is frozen.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
    llava-jax train --config configs/llava15_finetune_7b_one_gpu.py --workdir runs/finetune_7b_one_gpu

What differs from llava15_finetune_7b.py: Adam's moments are in bfloat16 (27 GB less), a step's rows go through in 64
micro-batches, and layers are apart, since a stack would be copied whole to be saved. Records of a step, rate and
schedule are the published ones. By arithmetic, not measured on that GPU, for 6.76 billion trained parameters: 27.0 GB
of float32 parameters, 27.0 GB of moments, 27.0 GB of summed gradients, 13.5 GB of new ones and 13.5 GB of parameters
in bfloat16, 0.6 GB of tower: 108.7 GB of 141, before activations (a row of 2048 tokens keeps 0.5 GB).

Numbers: scripts/v1_5/finetune.sh of the original, whose DeepSpeed config does not clip gradients.
"""

from llava_jax.data.rows import Conversations
from llava_jax.data.templates import V1
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
        optim=OptimConfig(learning_rate=2e-5, moments="bfloat16", clip_norm=None),
        accumulation=64,
        remat="everything",
        checkpoint_every=200,
    )
