"""`provenance.json`: where a folder's weights come from, and the sha256 of every file read and written."""

import datetime
import hashlib
import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from llava_jax.convert.checkpoint import PROVENANCE

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
    base_fingerprint: str | None = None,
) -> None:
    """Describes a written folder; to be called when all other files of it are there."""
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
    }
    if base_fingerprint is not None:
        content["base_fingerprint"] = base_fingerprint
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2) + "\n")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
