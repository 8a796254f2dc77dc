r"""LLaVA-1.6 34B, all of it trained: tower, projector and Nous-Hermes-2-Yi-34B. For `llava-jax plan` as yet: no
config makes its projector.

    llava-jax plan --config configs/llava16_finetune_34b.py --topology v5p:4x4x8

Sizes are those of liuhaotian/llava-v1.6-34b. A tile gives 576 slots, so a picture of five tiles fills most of a row.
"""

import dataclasses

from llava16_finetune_7b import get_config as finetune_7b

from llava_jax.data.templates import TEMPLATES
from llava_jax.sizes import LLAVA_16_34B
from llava_jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    base = finetune_7b()
    return dataclasses.replace(
        base,
        model=LLAVA_16_34B,
        init={**base.init, "decoder": "weights/Nous-Hermes-2-Yi-34B", "projector": "runs/pretrain_34b"},
        data=dataclasses.replace(
            base.data,
            tokenizer="weights/Nous-Hermes-2-Yi-34B",
            rows=dataclasses.replace(base.data.rows, template=TEMPLATES["chatml_direct"]),
        ),
    )
