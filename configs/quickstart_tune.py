r"""Quickstart, stage 2: train projector and decoder on questions about pictures; the tower stays as it is.

    llava-jax train --config configs/quickstart_tune.py --workdir runs/quickstart/tune

One question a record: docs/decisions.md says why.
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
        init={"tower": f"{RUNS}/align", "projector": f"{RUNS}/align", "decoder": f"{RUNS}/align"},
        trainable=("projector", "decoder"),
        data=DataConfig(
            records=f"{RUNS}/data/questions.json",
            image_root=f"{RUNS}/data/pictures",
            tokenizer=f"{RUNS}/data/tokenizer",
            rows=Conversations(template=MISTRAL, length=96, tiles=1, image_mode="square"),
            batch_rows=16,
            epochs=1,
            # The last records are the set's own questions, as often as it asks them.
            shuffle=False,
        ),
        optim=OptimConfig(learning_rate=1e-3, b2=0.95),
        compute_dtype="float32",
        seed=0,
        checkpoint_every=100,
    )
