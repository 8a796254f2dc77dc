r"""The toy of debug_cpu.py with LoRA: the decoder learns through adapters, random as it is.

llava-jax train --config configs/debug_lora.py --workdir runs/debug_lora
"""

from llava_jax.data.generated import temporary_data
from llava_jax.data.rows import Conversations
from llava_jax.data.templates import V1
from llava_jax.models.lora import LoraConfig
from llava_jax.sizes import DEBUG
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import next_token


def get_config() -> TrainConfig:
    data = temporary_data(num_records=64, image_size=DEBUG.vision.image_size, seed=0)
    return TrainConfig(
        model=DEBUG,
        objective=next_token,
        init={"tower": "random", "projector": "random", "decoder": "random"},
        trainable=("projector", "decoder"),
        data=DataConfig(
            records=str(data / "records.json"),
            image_root=str(data / "pictures"),
            tokenizer=str(data / "tokenizer"),
            rows=Conversations(template=V1, length=256, tiles=4),
            batch_rows=8,
            steps=40,
        ),
        optim=OptimConfig(learning_rate=3e-3, part_learning_rates={"projector": 1e-3}),
        lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05),
        compute_dtype="float32",
        checkpoint_every=5,
    )
