"""A tiny data set drawn from a seed, for runs that need no input."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.data.small_tokenizer import train_tokenizer

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 200), "yellow": (220, 200, 40)}
VOCAB_SIZE = 320


def generate_data(folder: str | Path, *, num_records: int, image_size: int, seed: int) -> None:
    """Writes `records.json`, `pictures/` and `tokenizer/`: plain squares of colour, and questions about them.

    Records hold no, one or two pictures, so that every path of the pipeline is taken.
    """
    rng = np.random.default_rng(seed)
    root = Path(folder)
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(num_records):
        names = list(rng.choice(list(COLOURS), size=(1, 1, 1, 0, 2)[number % 5]))
        images = []
        for place, name in enumerate(names):
            noise = rng.integers(-20, 20, (image_size, image_size, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            images.append(f"{number}_{place}.png")
            Image.fromarray(pixels).save(root / "pictures" / images[-1])
        question = "<image>\n" * len(names) + ("Which colour?" if names else "Is it dark at night?")
        turns = [("human", question), ("gpt", " and ".join(names) if names else "yes")]
        if number % 2:
            turns += [("human", "Are you sure?"), ("gpt", "yes")]
        record: dict = {"id": str(number), "conversations": [{"from": who, "value": text} for who, text in turns]}
        if images:
            record["image"] = images[0] if len(images) == 1 else images
        records.append(record)
    (root / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    train_tokenizer(texts, root / "tokenizer", vocab_size=VOCAB_SIZE)


def temporary_data(*, num_records: int, image_size: int, seed: int) -> Path:
    """The folder of such a data set under the system's temporary folder, made once."""
    # The user's own: mkdtemp's folders are closed to others, who would find this one and could not read it.
    name = f"llava_jax_generated_{os.getuid()}_{num_records}_{image_size}_{seed}"
    folder = Path(tempfile.gettempdir(), name)
    if not folder.is_dir():
        new = Path(tempfile.mkdtemp(prefix=f"{name}_"))
        generate_data(new, num_records=num_records, image_size=image_size, seed=seed)
        try:
            new.rename(folder)
        except OSError:
            # Another process made it first; the two are the same.
            if not folder.is_dir():
                raise
    return folder
