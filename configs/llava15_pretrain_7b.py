r"""LLaVA-1.5 stage 1: align CLIP with Vicuna-7B by training the projector alone on 558k captions.

    llava-jax train --config configs/llava15_pretrain_7b.py --workdir runs/pretrain_7b

Numbers: scripts/v1_5/pretrain.sh of the original, which prepares pictures without padding in this stage;
its DeepSpeed config does not clip gradients. Three captions and their pictures fill a row of 1792 tokens, where one of
2048, the original's longest sequence, would keep a gap (benchmarks/results/packing.md). Three micro-batches, so that a
step fits a `v5e:4x4` even if every record had a row of its own; packed, its 256 records take 96 rows there.
"""

from llava_jax.data.rows import Conversations
from llava_jax.data.templates import PLAIN
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
            "projector": "random",
        },
        trainable=("projector",),
        data=DataConfig(
            records="data/blip_laion_cc_sbu_558k.json",
            image_root="data/LLaVA-Pretrain/images",
            tokenizer="weights/vicuna-7b-v1.5",
            rows=Conversations(template=PLAIN, length=1792, tiles=3, image_mode="square", overflow="text"),
            batch_records=256,
            epochs=1,
            workers=8,
        ),
        optim=OptimConfig(learning_rate=1e-3, clip_norm=None),
        accumulation=3,
        stacked=True,
        remat="everything",
        checkpoint_every=200,
    )
