"""The length index: what every record takes, measured once, cached by the hash of all that decides it."""

import collections
import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from llava_jax.data.records import RecordFile, find_spans
from llava_jax.data.rows import Needs, RowFormat, Size
from llava_jax.errors import DataError, Refused

# Raise when the meaning of a cached index changes.
INDEX_VERSION = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Sizes of the records of one file; a refused record has size zero and its reason in `refused`."""

    records: RecordFile
    tokens: Int[np.ndarray, " n"]
    tiles: Int[np.ndarray, " n"]
    refused: dict[int, str]
    fingerprint: str

    @property
    def usable(self) -> Int[np.ndarray, " u"]:
        """Numbers of the records that can be trained on, in file order."""
        return np.flatnonzero(self.tokens)

    def size(self, record: int) -> Size:
        return Size(int(self.tokens[record]), int(self.tiles[record]))

    def counts(self) -> dict[str, int]:
        """How many records were refused, by reason (the text before the colon)."""
        return dict(collections.Counter(detail.partition(":")[0] for detail in self.refused.values()))


def load_index(path: str, rows: RowFormat, needs: Needs, cache: Path) -> Index:
    """The index of a record file, from `cache` if nothing that decides it has changed, else measured.

    A picture that changes on disk is not noticed until it is read: only names and headers are read here.
    """
    fingerprint = _fingerprint(path, rows, needs)
    stored = cache / f"index-{fingerprint[:16]}.npz"
    if stored.is_file():
        try:
            index = _read(stored, path, fingerprint)
            # Refused records are looked at again: their pictures may have been mended, and they are few.
            if all(_size(index.records, i, rows, needs)[1] == detail for i, detail in index.refused.items()):
                return index
        except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
            # A cache is only a cache: whatever is wrong with it, measuring again mends it.
            stored.unlink()
    index = _measure(path, rows, needs, fingerprint)
    _write(stored, index)
    return index


def check_refusals(index: Index, max_refused: float) -> None:
    """Raises `DataError` if more than that share of the records was refused, or all of them."""
    num_refused, num_records = len(index.refused), len(index.records)
    if num_refused > max_refused * num_records or num_refused == num_records:
        first, detail = next(iter(index.refused.items()))
        raise DataError(
            f"At most {max_refused:.1%} of the records may be refused; {num_refused} of {num_records} were in "
            f"{index.records.path} ({index.counts()}; first: record {first}, {detail}). "
            "Mend the data, or raise data.max_refused."
        )


def _measure(path: str, rows: RowFormat, needs: Needs, fingerprint: str) -> Index:
    records = RecordFile(path, find_spans(path))
    tokens, tiles = np.zeros(len(records), np.int32), np.zeros(len(records), np.int32)
    refused: dict[int, str] = {}
    for i in tqdm(range(len(records)), desc=f"measuring {Path(path).name}", unit="record", disable=None, leave=False):
        (tokens[i], tiles[i]), detail = _size(records, i, rows, needs)
        if detail is not None:
            refused[i] = detail
    return Index(records=records, tokens=tokens, tiles=tiles, refused=refused, fingerprint=fingerprint)


def _size(records: RecordFile, record: int, rows: RowFormat, needs: Needs) -> tuple[Size, str | None]:
    """What a record takes, or nothing and the reason why it is refused."""
    try:
        return rows.measure(records[record], needs), None
    except Refused as refusal:
        return Size(0, 0), str(refusal)


def _fingerprint(path: str, rows: RowFormat, needs: Needs) -> str:
    if not Path(path).is_file():
        raise DataError(f"data.records must name a JSON or JSONL file; got {path!r}, which does not exist.")
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    # Templates hold functions, whose repr has an address; their fields' values are what matters.
    shape = json.dumps(dataclasses.asdict(rows), default=lambda value: value.__qualname__, sort_keys=True)
    words = (INDEX_VERSION, content, shape, needs.tokenizer.fingerprint(), needs.image_size, needs.num_features)
    return hashlib.sha256(repr(words).encode()).hexdigest()


def _write(stored: Path, index: Index) -> None:
    stored.parent.mkdir(parents=True, exist_ok=True)
    details = json.dumps(index.refused).encode()
    with tempfile.NamedTemporaryFile(dir=stored.parent, suffix=".tmp", delete=False) as file:
        np.savez(
            file,
            spans=index.records.spans,
            tokens=index.tokens,
            tiles=index.tiles,
            refused=np.frombuffer(details, np.uint8),
        )
    os.replace(file.name, stored)


def _read(stored: Path, path: str, fingerprint: str) -> Index:
    with np.load(stored, allow_pickle=False) as arrays:
        refused = {int(i): detail for i, detail in json.loads(arrays["refused"].tobytes()).items()}
        return Index(
            records=RecordFile(path, arrays["spans"]),
            tokens=arrays["tokens"],
            tiles=arrays["tiles"],
            refused=refused,
            fingerprint=fingerprint,
        )
