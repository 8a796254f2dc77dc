"""Model folders: per-layer safetensors, `model.json`, `tokenizer/`, `provenance.json`; and reading any folder."""

import datetime
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.convert.card import FILE, ModelCard, read_card, write_card
from llava_jax.convert.layouts import from_huggingface
from llava_jax.errors import CheckpointError
from llava_jax.models.parameters import Parameters, part

WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer"
# What a tokenizer is, in transformers' folders; other files of a source folder are left behind.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)


def write_model_folder(folder: str, card: ModelCard, params: Mapping[str, Any], *, tokenizer: str, source: str) -> None:
    """Writes everything that `generate`, `chat`, `score` and `init` need; replaces an older folder in one move."""
    from safetensors.numpy import save_file

    target = Path(folder)
    if target.exists() and not (target / WEIGHTS).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"Only an older model folder is replaced; {folder!r} holds no {WEIGHTS}. Name another folder."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        # safetensors writes the buffer as it lies: a turned view would come back scrambled, without a word.
        save_file({name: np.asarray(value, order="C") for name, value in params.items()}, new / WEIGHTS)
        write_card(new, card)
        copy_tokenizer(tokenizer, new / TOKENIZER)
        provenance = {
            "source": source,
            "tool": f"llava_jax {metadata.version('llava_jax')}",
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sha256": {str(path.relative_to(new)): _sha256(path) for path in sorted(new.rglob("*")) if path.is_file()},
        }
        (new / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        new.chmod(0o755)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if target.exists():
        shutil.rmtree(target)
    os.replace(new, target)


def copy_tokenizer(source: str, target: Path) -> None:
    """Copies a tokenizer's files, so that a folder can be opened where its source is not."""
    if target.resolve() == Path(source).resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), target / name)


def read_parameters(folder: str, parts: Collection[str] | None = None) -> Parameters:
    """The parameters of a model folder, a training workdir (newest step) or a Hugging Face folder.

    `parts` names the parts wanted; the others are left out.

    Raises:
      CheckpointError: the folder is neither, is damaged, or has no such part.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"Weights must come from a folder or be 'random'; {folder!r} does not exist.")
    if Path(folder, WEIGHTS).is_file() and Path(folder, FILE).is_file():
        params = _read_safetensors(Path(folder, WEIGHTS))
    elif Path(folder, "checkpoints").is_dir():
        from llava_jax.convert.workdir import read_workdir

        params = read_workdir(folder)
    elif Path(folder, "config.json").is_file():
        params = from_huggingface(_read_shards(folder))
    else:
        read_card(folder)
        raise CheckpointError(f"A model folder must hold {WEIGHTS}; {folder!r} does not. Write it again.")
    if parts is None:
        return params
    found = {part(name) for name in params}
    if not set(parts) <= found:
        raise CheckpointError(
            f"{folder!r} has no part {', '.join(sorted(set(parts) - found))}; it has {', '.join(sorted(found))}. "
            "Mend init in the config."
        )
    return {name: value for name, value in params.items() if part(name) in parts}


def check_parameters(params: Mapping[str, Any], expected: Mapping[str, Any], source: str) -> None:
    """Refuses missing, unexpected and misshapen parameters, each by name."""
    problems = [f"missing {name}" for name in sorted(set(expected) - set(params))]
    problems += [f"unexpected {name}" for name in sorted(set(params) - set(expected))]
    problems += [
        f"{name} is {params[name].shape}, must be {expected[name].shape}"
        for name in sorted(set(params) & set(expected))
        if tuple(params[name].shape) != tuple(expected[name].shape)
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{source} does not hold this model: {shown}. Check its shape in the config.")


def _read_shards(folder: str) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face folder: one safetensors file, or the shards that its index names."""
    index = Path(folder, f"{WEIGHTS}.index.json")
    if not index.is_file():
        if not Path(folder, WEIGHTS).is_file():
            raise CheckpointError(f"{folder!r} must hold {WEIGHTS} or its index; it does not. Save it as safetensors.")
        return _read_safetensors(Path(folder, WEIGHTS))
    try:
        where = {str(tensor): Path(file) for tensor, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} must map tensors to files: {error!r}. Download it again.") from error
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(where.values())):
        if name.name != str(name):
            raise CheckpointError(f"Shards must lie beside their index; {index} names {str(name)!r}. Do not trust it.")
        tensors |= _read_safetensors(Path(folder, name))
    if set(tensors) != set(where):
        wrong = sorted(set(tensors) ^ set(where))
        raise CheckpointError(f"{index} and its shards must name the same tensors; they differ in {wrong[:8]}.")
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} must be a safetensors file: {error}. Write it again from its source.") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
