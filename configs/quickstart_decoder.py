r"""Quickstart, before stage 1: teach the decoder to read, as Vicuna can, on text alone.

    llava-jax train --config configs/quickstart_decoder.py --workdir runs/quickstart/decoder

A caption's words stand in the picture's place, in any number and order. A decoder that starts stage 2 from nothing
learns colours and shapes, but not to hold a word of the question against the picture, so that yes or no stays a guess.
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
        init={"tower": "random", "projector": "random", "decoder": "random"},
        trainable=("decoder",),
        data=DataConfig(
            records=f"{RUNS}/data/texts.json",
            image_root=f"{RUNS}/data/pictures",
            tokenizer=f"{RUNS}/data/tokenizer",
            rows=Conversations(template=MISTRAL, length=192, tiles=0),
            batch_rows=8,
            epochs=1,
            # The records come in the order of a curriculum.
            shuffle=False,
        ),
        optim=OptimConfig(learning_rate=2e-3, b2=0.95),
        compute_dtype="float32",
        seed=0,
        checkpoint_every=100,
    )
