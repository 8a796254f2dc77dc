r"""The whole path at toy size, with random weights and generated data: needs nothing, ends within a minute.

llava-jax train --config configs/debug_cpu.py --workdir runs/debug
"""

from llava_jax.data.generated import temporary_data
from llava_jax.data.rows import Conversations
from llava_jax.data.templates import V1
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
        compute_dtype="float32",
        checkpoint_every=5,
    )
