r"""LLaVA-1.6 34B, all of it trained: tower, projector and Nous-Hermes-2-Yi-34B. For `llava-jax plan` as yet.

    llava-jax plan --config configs/llava16_finetune_34b.py --topology v5p:4x4x8

Sizes are those of liuhaotian/llava-v1.6-34b. A tile gives 576 slots, so a picture of five tiles fills most of a row.
"""

from llava_jax.data.anyres import AnyRes
from llava_jax.data.rows import Conversations
from llava_jax.data.templates import TEMPLATES
from llava_jax.sizes import LLAVA_16_34B
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import next_token

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def get_config() -> TrainConfig:
    return TrainConfig(
        model=LLAVA_16_34B,
        objective=next_token,
        init={
            "tower": "weights/clip-vit-large-patch14-336",
            "decoder": "weights/Nous-Hermes-2-Yi-34B",
            "projector": "runs/pretrain_34b",
            "image_newline": "random",
        },
        trainable=("tower", "projector", "image_newline", "decoder"),
        data=DataConfig(
            records="data/llava_next.json",
            image_root="data",
            tokenizer="weights/Nous-Hermes-2-Yi-34B",
            rows=Conversations(
                template=TEMPLATES["chatml_direct"],
                length=4096,
                tiles=6,
                image_mode=AnyRes(pinpoints=PINPOINTS, merge="spatial_unpad", rounding="original"),
                overflow="text",
            ),
            batch_records=128,
            epochs=1,
            workers=8,
        ),
        optim=OptimConfig(learning_rate=2e-5, part_learning_rates={"tower": 2e-6}),
        stacked=True,
        remat="everything",
        checkpoint_every=200,
    )
