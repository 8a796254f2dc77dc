"""The weight files of a folder: one file or the shards that an index names, safetensors or torch's."""

import contextlib
import fnmatch
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llava_jax.convert.fields import read_json
from llava_jax.convert.safetensors_file import open_safetensors
from llava_jax.convert.tensor import Tensor
from llava_jax.convert.torch_file import open_torch
from llava_jax.errors import CheckpointError

# In the order of transformers: safetensors win over pickles.
NAMES = ("model.safetensors", "pytorch_model.bin")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Weights(NamedTuple):
    """Tensors by key, and the files that hold them."""

    tensors: dict[str, Tensor]
    files: tuple[Path, ...]


def open_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by its ending."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. Download it again.")
    return open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() or (folder / f"{name}.index.json").is_file() for name in NAMES)


def open_weights(folder: Path) -> Weights:
    """All tensors of a folder, none read yet.

    Raises:
      CheckpointError: there are none; a shard is missing, damaged or outside of the folder; index and shards differ.
    """
    for name in NAMES:
        if (folder / f"{name}.index.json").is_file():
            return _open_shards(folder, folder / f"{name}.index.json")
        if (folder / name).is_file():
            return Weights(open_file(folder / name), (folder / name,))
    raise CheckpointError(
        f"{str(folder)!r} must hold {' or '.join(NAMES)}, or an index; it does not. Download it again."
    )


def _open_shards(folder: Path, index: Path) -> Weights:
    content = read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index} must map tensors to files in its weight_map. Download it again.")
    tensors: dict[str, Tensor] = {}
    files = []
    for name in sorted(set(where.values())):
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name or len(name.encode()) > 255:
            raise CheckpointError(f"Shards must lie beside their index; {index} names {name!r:.80}. Do not trust it.")
        keys = sorted(key for key, file in where.items() if file == name)
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing, the shard of {keys[0]} and {len(keys) - 1} more. Download it again."
            )
        found = open_file(folder / name)
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise CheckpointError(f"{folder / name} holds {', '.join(twice[:8])}, which an earlier shard holds too.")
        if set(found) != set(keys):
            missing, extra = sorted(set(keys) - set(found)), sorted(set(found) - set(keys))
            raise CheckpointError(
                f"{folder / name} must hold what {index.name} says: missing {missing[:8]}, unexpected {extra[:8]}."
            )
        tensors |= found
        files.append(folder / name)
    return Weights(tensors, tuple(files))


def locate(source: str) -> Path:
    """The local folder or file of a source; a hub name is downloaded, unless a path of that name exists.

    Raises:
      CheckpointError: there is neither a path nor a repository of that name.
    """
    path = Path(source)
    # Neither has a name that is too long to be one.
    with contextlib.suppress(OSError):
        if path.exists():
            return path
    if not _HUB_NAME.fullmatch(source):
        raise CheckpointError(
            f"Weights must come from a folder or a hub name; {source!r} does not exist. Check its spelling."
        )
    return _download(source)


def _download(repository: str) -> Path:
    """The files of a repository that matter here, from the hub, or those downloaded before if it does not answer."""
    import huggingface_hub

    files = None
    try:
        files = huggingface_hub.list_repo_files(repository)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_wanted(files)))
    except Exception as error:  # The library raises many kinds of them.
        status = getattr(getattr(error, "response", None), "status_code", None)
        is_refusal = status in (401, 403, 404)
        # A download that broke has left a part of the files.
        if files is None and not is_refusal:
            with contextlib.suppress(Exception):
                kept = {"local_files_only": True, "allow_patterns": _wanted(["model.safetensors"])}
                folder = Path(huggingface_hub.snapshot_download(repository, **kept))
                told = f"the hub did not answer for {repository!r}; taking {folder}, downloaded before."
                print(f"llava-jax: {told}", file=sys.stderr)
                return folder
        remedy = "Check the network and run the same command again; files that are complete are kept."
        if is_refusal:
            remedy = "Check the name; if it is private or gated, ask for access on its page and run `hf auth login`."
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{repository!r} is no local path, and the hub did not give it: {reason:.200}. {remedy}"
        ) from error


def _wanted(files: Sequence[str]) -> list[str]:
    """Configs, tokenizers, and one format of the weights: both hold the same, and transformers, too, takes safetensors
    where there are any.
    """
    wanted = ["*.json", "*.model", "*.jinja", "LICENSE*", "mm_projector.bin", "non_lora_trainables.bin"]
    for safe, pickled in (
        ("model*.safetensors", "pytorch_model*.bin"),
        ("adapter_model.safetensors", "adapter_model.bin"),
    ):
        wanted.append(safe if fnmatch.filter(files, safe) else pickled)
    return wanted
