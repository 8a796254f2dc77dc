"""How the cost of a step of stage 2 grows with its rows, their length, their pictures, and the decoder's layers.

python -m benchmarks.scaling                          # about 50M parameters, float32, this CPU
python -m benchmarks.scaling --device gpu --size 7b   # from LLaVA-1.5-7B's shape with 4 layers, bfloat16, one GPU

One thing is doubled at a time. `seconds per FLOP` sets the first line of each to 1: below 1, the larger step uses the
machine better; above 1, something grows faster than the model's products (see `llava_jax/train/flops.py`). What a step
sends over a TPU's links, slice by slice, is in `benchmarks/results/plans.md`.
"""

import dataclasses
from typing import Any

import numpy as np

from benchmarks.report import arguments, in_turns, publish, quartiles
from benchmarks.train import Ours, conversations

# Rows, slots of a row, pictures of a row, layers: the middle that one at a time departs from.
BASES = {"small": (2, 256, 1, 2), "7b": (4, 1024, 1, 4), "tiny": (2, 128, 1, 2)}
AXES = ("rows", "slots a row", "pictures a row", "layers")


def main() -> None:
    chosen = arguments((__doc__ or "").splitlines()[0], sizes=tuple(BASES))
    chosen.stage = "stage2"
    from benchmarks import peer

    rows: list[dict[str, Any]] = []
    for axis, name in enumerate(AXES):
        first = None
        for factor in (1, 2, 4):
            case = [size * (factor if i == axis else 1) for i, size in enumerate(BASES[chosen.size])]
            # A row must hold all of its pictures, and answers beside them.
            case[1] += 4 * peer.SIZES[chosen.size].num_features if name == "pictures a row" else 0
            seconds, flops = measure(chosen, *case)
            cost = float(np.median(seconds)) / flops
            first = first or cost
            rows.append(
                {
                    **dict(zip(AXES, case, strict=True)),
                    "varied": name,
                    "step, s": quartiles(seconds),
                    "GFLOP": flops / 1e9,
                    "seconds per FLOP": cost / first,
                }
            )
    publish("scaling", chosen, rows, {"what": f"{chosen.repeats} repeats each"})


def measure(chosen: Any, num_rows: int, length: int, pictures: int, layers: int) -> tuple[list[float], int]:
    """Seconds of a step, repeated, and its FLOPs."""
    from benchmarks import peer

    config = peer.SIZES[chosen.size]
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=layers))
    ours = Ours(chosen, config, None)
    ours.make_step(most_records=pictures)
    share = length // pictures
    examples = conversations([share] * (num_rows * pictures), config, num_text=0)
    rows = [list(range(row * pictures, (row + 1) * pictures)) for row in range(num_rows)]
    batch = ours.place(ours.rows(examples, rows, length, pictures))

    def step() -> None:
        loss = ours.step(batch)
        assert loss > 0, "a row must have room for its answers"

    return in_turns({"step": step}, repeats=chosen.repeats, warmups=2)["step"], ours.flops(batch)


if __name__ == "__main__":
    main()
