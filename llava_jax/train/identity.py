"""Which run a workdir belongs to: written when it begins, compared when it goes on."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_jax.convert.card import ModelCard, write_card
from llava_jax.convert.fields import read_object
from llava_jax.convert.folder import TOKENIZER, copy_tokenizer
from llava_jax.data.rows import Conversations
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import CheckpointError
from llava_jax.train import processes
from llava_jax.train.config import TrainConfig, flatten

# Where things lie.
PLACES = ("data.image_root", "data.records", "data.tokenizer")
# Fields that may differ between the start of a run and its continuation: they change no number of it.
MAY_CHANGE = (
    "init.",
    "mesh.",
    "checkpoint_every",
    "log_every",
    "life.",
    "data.workers",
    *PLACES,
)


def describe(config: TrainConfig, workdir: str) -> None:
    """Makes the workdir say what it holds, so that it opens as a model wherever it is copied."""
    if not processes.is_first():
        return
    rows = config.data.rows
    copy_tokenizer(config.data.tokenizer, Path(workdir, TOKENIZER))
    if rows.added_tokens:
        open_tokenizer(config.data.tokenizer, rows.added_tokens).save(Path(workdir, TOKENIZER))
    label = f"trained: {', '.join(config.trainable)}"
    card = ModelCard(model=config.model, template=None, image_mode=rows.image_mode, label=label)
    if isinstance(rows, Conversations):
        card = dataclasses.replace(card, template=rows.template.name, mm_use_im_start_end=rows.mm_use_im_start_end)
    write_card(workdir, card)
    temporary = Path(workdir, "config.json.tmp")
    temporary.write_text(json.dumps(flatten(config), indent=2) + "\n")
    os.replace(temporary, Path(workdir, "config.json"))


def config_hash(config: TrainConfig) -> str:
    """Of all that the processes of a run must have in common; where a host keeps its files is its own affair."""
    leaves = {name: value for name, value in flatten(config).items() if not name.startswith(("init.", *PLACES))}
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()


def check_same_run(
    config: TrainConfig, workdir: str, position: Mapping[str, Any], saved_position: Mapping[str, Any]
) -> None:
    """Refuses to continue a run with another config or other data."""
    before = read_object(Path(workdir, "config.json"))
    now = json.loads(json.dumps(flatten(config)))
    changed = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(MAY_CHANGE)
    ]
    if changed:
        raise CheckpointError(
            f"A run continues only with the config it began with; {workdir!r} has another: {'; '.join(changed[:5])}. "
            "Put it back or choose another --workdir."
        )
    if saved_position != position:
        raise CheckpointError(
            f"A run continues only on the data it began with; the records, the tokenizer or the plan of {workdir!r} "
            "have changed. Put them back or choose another --workdir."
        )
