r"""LLaVA v1 stage 1: align CLIP at 224 pixels with Vicuna-7B through one linear layer, on 595k captions.

    llava-jax train --config configs/llava_v1_pretrain_7b.py --workdir runs/v1_pretrain_7b

Numbers: scripts/pretrain.sh of the original, whose DeepSpeed config does not clip gradients. A picture takes 256 slots.
For 13B exchange LLAVA_V1_13B and weights/vicuna-13b-v1.3.
"""

from llava_jax.data.rows import Conversations
from llava_jax.data.templates import PLAIN
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
            "projector": "random",
        },
        trainable=("projector",),
        data=DataConfig(
            records="data/cc3m_595k_chat.json",
            image_root="data/CC3M-595K",
            tokenizer="weights/vicuna-7b-v1.3",
            rows=Conversations(template=PLAIN, length=2048, tiles=7, image_mode="square", overflow="text"),
            batch_records=128,
            epochs=1,
            workers=8,
        ),
        optim=OptimConfig(learning_rate=2e-3, clip_norm=None),
        stacked=True,
        remat="everything",
        checkpoint_every=200,
    )
