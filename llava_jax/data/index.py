"""The length index: what every record takes, measured once, cached by the hash of all that decides it."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import Int

from llava_jax.data.mix import Choice, Mix, Records, as_mix, fingerprint_mix, open_records
from llava_jax.data.records import RecordFile
from llava_jax.data.rows import Needs, RowFormat, Size
from llava_jax.data.workers import ask_all
from llava_jax.errors import DataError, Refused

# Raise when the meaning of a cached index changes.
INDEX_VERSION = 3

# Records that may be replaced in any run.
FEW = 20
# Byte ranges of records in a cached index, by part.
SPANS = "spans_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Sizes of the records of a mix; a refused record has size zero and its reason in `refused`."""

    records: Records
    tokens: Int[np.ndarray, " n"]
    tiles: Int[np.ndarray, " n"]
    refused: dict[int, str]
    fingerprint: str

    @property
    def usable(self) -> Int[np.ndarray, " u"]:
        """Numbers of the records that can be trained on, in their order."""
        return np.flatnonzero(self.tokens)

    def size(self, record: int) -> Size:
        return Size(int(self.tokens[record]), int(self.tiles[record]))

    def counts(self) -> dict[str, int]:
        """How many records were refused, by reason (the text before the colon)."""
        return dict(collections.Counter(detail.partition(":")[0] for detail in self.refused.values()))


def load_index(
    records: Choice,
    rows: RowFormat,
    needs: Needs,
    cache: Path,
    *,
    look_again: bool = True,
    num_workers: int | None = None,
) -> Index:
    """The index of a run's records, from `cache` if nothing that decides it has changed, else measured.

    A picture that changes on disk is not noticed until it is read: only names and headers are read here. Records that
    the cached index refuses are looked at once more, as their pictures may have been mended, if `look_again`: a run
    that goes on must keep the plan it has. The index is the same for any number of measuring processes; None takes as
    many as there are CPUs, once there is enough to do.
    """
    mix = as_mix(records)
    fingerprint = _fingerprint(mix, rows, needs)
    stored = cache / f"index-{fingerprint[:16]}.npz"
    if stored.is_file():
        try:
            index = _read(stored, mix, fingerprint, as_written=rows.as_written)
            refused = index.refused.items() if look_again else ()
            if all(_size(index.records, rows, needs, i)[1] == detail for i, detail in refused):
                return index
        except DataError:
            # The records cannot be read; nothing is wrong with the cache.
            raise
        except Exception:
            # A cache is only a cache: whatever is wrong with it, measuring again mends it. numpy and zipfile raise
            # what they meet in damaged bytes, and another process may have removed the file first.
            stored.unlink(missing_ok=True)
    index = _measure(open_records(mix, as_written=rows.as_written), rows, needs, fingerprint, num_workers)
    _write(stored, index)
    return index


def check_refusals(index: Index, max_refused: float) -> None:
    """Raises `DataError` if more than that share of the records was refused, or all of them."""
    num_refused, num_records = len(index.refused), len(index.records)
    if num_refused > max_refused * num_records or num_refused == num_records:
        first, detail = next(iter(index.refused.items()))
        raise DataError(
            f"At most {max_refused:.1%} of the records may be refused; {num_refused} of {num_records} were in "
            f"{index.records.path} ({index.counts()}; first: {index.records.describe(first)}, {detail}). "
            "Mend the data, or raise data.max_refused."
        )


def check_replaced(num_replaced: int, num_read: int, max_refused: float) -> None:
    """Raises `DataError` if more than that share of what a run read, and more than a few, could not be read."""
    if num_replaced > max(FEW, max_refused * num_read):
        raise DataError(
            f"At most {max_refused:.1%} of the records may be replaced by others because they cannot be read; "
            f"{num_replaced} of {num_read} were. Look for a folder of pictures that has gone, or raise "
            "data.max_refused."
        )


def _measure(records: Records, rows: RowFormat, needs: Needs, fingerprint: str, num_workers: int | None) -> Index:
    tokens, tiles = np.zeros(len(records), np.int32), np.zeros(len(records), np.int32)
    refused: dict[int, str] = {}
    ask = functools.partial(_size, records, rows, needs)
    sizes = ask_all(ask, len(records), label=f"measuring {records.path}", num_workers=num_workers)
    for i, (size, detail) in enumerate(sizes):
        tokens[i], tiles[i] = size
        if detail is not None:
            refused[i] = detail
    return Index(records=records, tokens=tokens, tiles=tiles, refused=refused, fingerprint=fingerprint)


def _size(records: Records, rows: RowFormat, needs: Needs, record: int) -> tuple[Size, str | None]:
    """What a record takes, or nothing and the reason why it is refused."""
    try:
        return rows.measure(records[record], needs), None
    except Refused as refusal:
        return Size(0, 0), str(refusal)


def _fingerprint(mix: Mix, rows: RowFormat, needs: Needs) -> str:
    # Templates hold functions, whose repr has an address; their fields' values are what matters.
    shape = json.dumps(dataclasses.asdict(rows), default=lambda value: value.__qualname__, sort_keys=True)
    looks = (needs.tokenizer.fingerprint(), needs.image_size, needs.num_features, needs.max_positions)
    words = (INDEX_VERSION, fingerprint_mix(mix), shape, *looks)
    return hashlib.sha256(repr(words).encode()).hexdigest()


def _write(stored: Path, index: Index) -> None:
    stored.parent.mkdir(parents=True, exist_ok=True)
    sources = enumerate(index.records.sources)
    spans = {f"{SPANS}{part}": source.spans for part, source in sources if isinstance(source, RecordFile)}
    arrays = {
        "tokens": index.tokens,
        "tiles": index.tiles,
        "refused": np.frombuffer(json.dumps(index.refused).encode(), np.uint8),
    }
    with tempfile.NamedTemporaryFile(dir=stored.parent, suffix=".tmp", delete=False) as file:
        np.savez(file, allow_pickle=False, **arrays, **spans)
    os.replace(file.name, stored)


def _read(stored: Path, mix: Mix, fingerprint: str, *, as_written: bool) -> Index:
    with np.load(stored, allow_pickle=False) as arrays:
        # numpy reads as much as a header asks for, and zipfile compares checksums at a member's end: one bit of a
        # header can make an array smaller, and nobody would know.
        if (member := arrays.zip.testzip()) is not None:
            raise ValueError(f"{stored} must hold what was written; the checksum of {member} differs.")
        spans = {int(name.removeprefix(SPANS)): arrays[name] for name in arrays.files if name.startswith(SPANS)}
        refused = {int(i): detail for i, detail in json.loads(arrays["refused"].tobytes()).items()}
        index = Index(
            records=open_records(mix, as_written=as_written, spans=spans),
            tokens=arrays["tokens"],
            tiles=arrays["tiles"],
            refused=refused,
            fingerprint=fingerprint,
        )
    if not len(index.tokens) == len(index.tiles) == len(index.records):
        raise ValueError(
            f"{stored} must hold a size for each of {len(index.records)} records; got {len(index.tokens)} and "
            f"{len(index.tiles)}."
        )
    return index
