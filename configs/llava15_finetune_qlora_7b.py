r"""LLaVA-1.5 stage 2 with QLoRA on one GPU of 24 GB: adapters on Vicuna-7B in 4 bits, and the whole projector.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
    llava-jax train --config configs/llava15_finetune_qlora_7b.py --workdir runs/finetune_qlora_7b

Numbers: those of llava15_finetune_lora_7b.py (the original's only QLoRA script is of v1), on linear layers in nf4 with
float32 scales; it would quantize the scales too. Memory, by arithmetic, not measured on such a GPU:

    nf4 codes of 6,476,005,376 weights, half a byte each       3.02 GiB
    their scales, 4 bytes for 64 weights                       0.38 GiB
    embedding, head (262 M) and tower (304 M) in bfloat16      1.05 GiB
    factors (320 M) and projector (21 M) in float32            1.27 GiB
    their Adam moments                                         2.54 GiB
    their gradients, summed and new, and a bfloat16 copy       2.54 GiB
    what enters each of 32 layers, 2 rows of 2048 tokens       1.00 GiB
    one layer while it is redone, its weights in bfloat16      about 4 GiB
    together                                                   about 16 GiB

The rest is for what the compiler adds. Layers are apart, since a stack would be copied whole to be saved.
"""

import dataclasses

from llava15_finetune_lora_7b import get_config as finetune_lora_7b

from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(finetune_lora_7b(), quantize="nf4", accumulation=64, stacked=False)
