r"""LLaVA-1.6 with Vicuna-7B, all of it trained: the tower at its own rate, pictures in any resolution.

    llava-jax train --config configs/llava16_finetune_7b.py --workdir runs/finetune_16_7b

Published for 1.6: the whole model trained on about 760k records (lmms-lab/LLaVA-NeXT-Data has 739k of them), the tower
at 2e-6, 4096 tokens, `anyres` with `spatial_unpad`, starting from 1.5's projector. Batch and the rate of all else were
not; they are 1.5's. Gradients are clipped, as in the DeepSpeed configs of LLaVA-NeXT.
"""

from llava_jax.data.anyres import AnyRes
from llava_jax.data.rows import Conversations
from llava_jax.data.templates import V1
from llava_jax.sizes import LLAVA_16_7B
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import next_token

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def get_config() -> TrainConfig:
    return TrainConfig(
        model=LLAVA_16_7B,
        objective=next_token,
        init={
            "tower": "weights/clip-vit-large-patch14-336",
            "decoder": "weights/vicuna-7b-v1.5",
            "projector": "runs/pretrain_7b",
            "image_newline": "random",
        },
        trainable=("tower", "projector", "image_newline", "decoder"),
        data=DataConfig(
            records="data/llava_next.json",
            image_root="data",
            tokenizer="weights/vicuna-7b-v1.5",
            rows=Conversations(
                template=V1,
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
