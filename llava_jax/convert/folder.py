"""Writing folders, in one move: our model folders, and what every written folder has in common."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from llava_jax.convert.card import ModelCard, write_card
from llava_jax.convert.checkpoint import (
    SOURCE_CONFIG,
    TOKENIZER,
    TOKENIZER_FILES,
    Checkpoint,
    open_checkpoint,
    without_files,
)
from llava_jax.convert.provenance import PROVENANCE, write_provenance
from llava_jax.convert.safetensors_file import split, total_bytes, write_safetensors
from llava_jax.convert.tensor import Tensor
from llava_jax.data.tokenizer import copy_files, open_tokenizer
from llava_jax.errors import CheckpointError
from llava_jax.models.parameters import Parameters, part
from llava_jax.shapes import ModelConfig

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# What transformers 4 and the hub split at.
SHARD_BYTES = 5_000_000_000


def write_model_folder(
    folder: str,
    card: ModelCard,
    params: Mapping[str, Any],
    *,
    tokenizer: str | None,
    source: str,
    added_tokens: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything that `generate`, `chat`, `score` and `init` need; replaces an older folder in one move.

    `params` are arrays, or tensors that still lie in their files; the tokenizer gets those of `added_tokens` that it
    lacks; `config` is the source's own config.json and `record` what provenance says beyond `source`.
    """
    tensors = dict(params) if _in_files(params) else without_files(params, source)
    with staged(folder) as new:
        write_weights(new, tensors)
        write_card(new, card)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, new / TOKENIZER, added_tokens)
        if config:
            (new / SOURCE_CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
        write_provenance(new, source=source, **(record or {}))


def _in_files(params: Mapping[str, Any]) -> bool:
    return bool(params) and all(isinstance(value, Tensor) for value in params.values())


@contextlib.contextmanager
def staged(folder: str) -> Iterator[Path]:
    """A fresh folder that takes the place of `folder` when all of it was written, and leaves nothing if it fails.

    Raises:
      CheckpointError: something is there that was not written here.
    """
    # What a link points to is replaced, not the link.
    target = Path(folder).resolve()
    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty and not (target / PROVENANCE).is_file():
        raise CheckpointError(
            f"Only a folder that was written here is replaced; {folder!r} holds no {PROVENANCE}. Name another folder."
        )
    new = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        yield new
        new.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(new, target)
    except BaseException as error:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{folder!r} could not be written: {error}. Free space or name another folder."
            ) from error
        raise


def write_weights(folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """One safetensors file, or shards and the index of them; one tensor is in memory at a time."""
    from tqdm import tqdm

    shards = split(tensors, shard_bytes)
    total = total_bytes(tensors.values())
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=total < 1e8, leave=False) as bar:
        if len(shards) == 1:
            write_safetensors(folder / WEIGHTS, tensors, bar.update)
            return
        where = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_safetensors(folder / name, shard, bar.update)
            where |= dict.fromkeys(shard, name)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer(source: str, target: Path, added: Sequence[str] = ()) -> None:
    """Copies a tokenizer's files, so that a folder can be opened where its source is not.

    Those of `added` that the tokenizer lacks are numbered after its own.
    """
    copy_files(source, target, TOKENIZER_FILES)
    if added:
        tokenizer = open_tokenizer(source)
        if None in map(tokenizer.token_id, added):
            tokenizer.with_tokens(*added).save(target)


def read_parameters(source: str, parts: Collection[str] | None = None) -> Parameters:
    """The parameters of whatever `open_checkpoint` opens, as tensors that still lie in their files.

    `parts` names the parts wanted; the others are left out.

    Raises:
      CheckpointError: the source is none of these, is damaged, or has no such part.
    """
    found = open_checkpoint(source)
    return dict(found.params) if parts is None else parts_of(found, parts, source)


def parts_of(checkpoint: Checkpoint, parts: Collection[str], source: str) -> Parameters:
    """The parameters of the named parts, all of which must be there."""
    params = checkpoint.params
    found = {part(name) for name in params}
    if not set(parts) <= found:
        raise CheckpointError(
            f"{source!r} has no part {', '.join(sorted(set(parts) - found))}; it has {', '.join(sorted(found))}. "
            "Mend init in the config."
        )
    return {name: value for name, value in params.items() if part(name) in parts}


def read_part(source: str, name: str, model: ModelConfig) -> Parameters:
    """The parameters of one part, from a checkpoint in which that part would compute the same numbers.

    Raises:
      CheckpointError: the checkpoint has no such part, or its own config gives the part another shape.
    """
    found = open_checkpoint(source)
    field = {"decoder": "text", "tower": "vision"}.get(name)
    theirs, ours = (getattr(config, field, config) if field else None for config in (found.model, model))
    if ours is not None and dataclasses.is_dataclass(theirs) and type(theirs) is type(ours):
        # How many positions may be used is the run's to say; of the vocabulary the tensors tell more.
        names = [entry.name for entry in dataclasses.fields(ours) if entry.name not in ("max_positions", "vocab_size")]
        differing = [
            f"{key} is {getattr(theirs, key)!r} there, {getattr(ours, key)!r} here"
            for key in names
            if getattr(theirs, key) != getattr(ours, key)
        ]
        if differing:
            raise CheckpointError(
                f"init.{name}={source} was trained as another {field}: {'; '.join(differing)}. Mend model.{field}."
            )
    return parts_of(found, {name}, source)


def check_parameters(params: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    """Refuses missing, unexpected and misshapen parameters, each by name."""
    problems = [f"missing {name}" for name in sorted(set(expected) - set(params))]
    problems += [f"unexpected {name}" for name in sorted(set(params) - set(expected))]
    problems += [
        f"{name} is {params[name].shape}, must be {expected[name].shape}"
        for name in sorted(set(params) & set(expected))
        if tuple(params[name].shape) != tuple(expected[name].shape)
    ]
    problems += [
        f"{name} is {value.dtype}, which holds no weights"
        for name, value in sorted(params.items())
        if not jnp.issubdtype(value.dtype, jnp.floating)
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{source} does not hold this model: {shown}. Check its shape in the config.")
