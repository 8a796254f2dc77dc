r"""LLaVA-1.5 stage 2 on one H200: tune projector and Vicuna-7B on the 665k mix; the tower is frozen.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
    llava-jax train --config configs/llava15_finetune_7b_one_gpu.py --workdir runs/finetune_7b_one_gpu

What differs from llava15_finetune_7b.py: Adam's moments are in bfloat16 (27 GB less), a step's rows go through in 16
micro-batches (those that packing leaves empty are skipped), and layers are apart, since a stack would be copied whole
to be saved. Records of a step, rate and schedule are the published ones. By arithmetic, not measured on that GPU, for
6.76 billion trained parameters: 27.0 GB of float32 parameters, 27.0 GB of moments, 27.0 GB of summed gradients, 13.5
GB of new ones and 13.5 GB of parameters in bfloat16, 0.6 GB of tower: 108.7 GB of 141, before activations (what
enters each layer, 0.5 GB for a row of 2048 tokens, five or six of them at a time). The compiler, asked for 8 rows at
a time, more than packed records need, and for layers as a stack: 120 GB in all (`benchmarks/results/plans.md`,
`h200:1`, in GiB).
"""

import dataclasses

from llava15_finetune_7b import get_config as finetune_7b

from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    base = finetune_7b()
    return dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, moments="bfloat16"),
        accumulation=16,
        stacked=False,
    )
