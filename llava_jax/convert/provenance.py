"""`provenance.json`: where a folder's weights come from, and the sha256 of every file read and written."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_jax.convert.fields import Fields, read_object

PROVENANCE = "provenance.json"
_LICENCE = (
    "The weights keep the licence of their source and of the models it was built from; that of llava_jax covers none "
    "of them."
)


def write_provenance(
    folder: Path,
    *,
    source: str,
    layout: str = "",
    files: Sequence[Path] = (),
    notes: Sequence[str] = (),
    unsaid: Mapping[str, Any] | None = None,
) -> None:
    """Describes a written folder; to be called when all other files of it are there.

    `unsaid` is what its layout has no place for, to be read again by `read_provenance`.
    """
    licences = sorted({str(path) for file in files for path in file.parent.glob("LICENSE*")})
    content = {
        "source": source,
        "layout": layout,
        "source_sha256": {str(path): sha256(path) for path in files},
        "tool": f"llava_jax {metadata.version('llava_jax')}",
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "licence": " ".join([_LICENCE, *(f"See {path}." for path in licences)]),
        "notes": list(notes),
        "sha256": {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()},
        **(unsaid or {}),
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n")


def read_provenance(folder: Path) -> Fields:
    """What was written so; no fields where nothing was."""
    path = folder / PROVENANCE
    return Fields(read_object(path) if path.is_file() else {}, str(path))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
