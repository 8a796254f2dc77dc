r"""Quickstart, stage 1: train the projector alone on captions.

    llava-jax train --config configs/quickstart_align.py --workdir runs/quickstart/align

The decoder can read by now (configs/quickstart_decoder.py), so the projector learns to turn what the tower sees into
what the decoder would have read. It only knows conversations, so the captions come as answers; a language model that
has seen all kinds of text is aligned with the plain template (configs/llava15_pretrain_7b.py).
"""

from llava_jax.data.conversation import V1
from llava_jax.data.rows import Conversations
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
            rows=Conversations(template=V1, length=256, tiles=2, image_mode="square"),
            batch_rows=16,
            steps=150,
        ),
        optim=OptimConfig(learning_rate=2e-3, b2=0.95),
        compute_dtype="float32",
        checkpoint_every=50,
    )
