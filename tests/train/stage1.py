"""The first stage of the debugging config: the projector learns, all else is frozen.

llava-jax train --config tests/train/stage1.py --workdir runs/stage1
"""

import dataclasses
import runpy

from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    config = runpy.run_path("configs/debug_cpu.py")["get_config"]()
    return dataclasses.replace(config, trainable=("projector",))
