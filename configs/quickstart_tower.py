r"""Quickstart, stage 0: train a small CLIP on captions, so that its tower knows shapes and colours.

    llava-jax train --config configs/quickstart_tower.py --workdir runs/quickstart/tower

`llava-jax quickstart` writes the data that this reads, and runs this stage and the three after it.
"""

from llava_jax.data.rows import Augment, Captions
from llava_jax.sizes import QUICKSTART_CLIP
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import patch_contrastive

DATA = "runs/quickstart/data"
PARTS = ("tower", "caption", "visual_projection", "text_projection", "logit_scale")


def get_config() -> TrainConfig:
    return TrainConfig(
        model=QUICKSTART_CLIP,
        objective=patch_contrastive,
        init=dict.fromkeys(PARTS, "random"),
        trainable=PARTS,
        data=DataConfig(
            records=f"{DATA}/captions.json",
            image_root=f"{DATA}/pictures",
            tokenizer=f"{DATA}/tokenizer",
            rows=Captions(length=8, augment=Augment(mirror=True, shift=12)),
            batch_rows=64,
            steps=1000,
        ),
        optim=OptimConfig(learning_rate=3e-3),
        compute_dtype="float32",
        seed=0,
        checkpoint_every=300,
    )
