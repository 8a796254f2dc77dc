r"""Quickstart, stage 1: train the projector alone on captions.

    llava-jax train --config configs/quickstart_align.py --workdir runs/quickstart/align

The decoder can read by now (configs/quickstart_decoder.py), so the projector learns to turn what the tower sees into
what the decoder would have read.
"""

from llava_jax.data.rows import Conversations
from llava_jax.data.templates import MISTRAL
from llava_jax.sizes import QUICKSTART_LLAVA
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import next_token

RUNS = "runs/quickstart"


def get_config() -> TrainConfig:
    return TrainConfig(
        model=QUICKSTART_LLAVA,
        objective=next_token,
        init={"tower": f"{RUNS}/tower", "projector": "random", "decoder": f"{RUNS}/decoder"},
        trainable=("projector",),
        data=DataConfig(
            records=f"{RUNS}/data/captions.json",
            image_root=f"{RUNS}/data/pictures",
            tokenizer=f"{RUNS}/data/tokenizer",
            rows=Conversations(template=MISTRAL, length=352, tiles=4, image_mode="square"),
            batch_rows=8,
            steps=100,
        ),
        optim=OptimConfig(learning_rate=2e-3),
        compute_dtype="float32",
        seed=0,
        checkpoint_every=50,
    )
