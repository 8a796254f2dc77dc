"""Reads every record once, pictures decoded, counts what is refused, by reason, and says how well the rest packs."""

import collections
import functools
from collections.abc import Mapping

import numpy as np

from llava_jax.data.index import Index
from llava_jax.data.mix import Choice, Records, as_mix, open_records
from llava_jax.data.plan import pack
from llava_jax.data.rows import Needs, RowFormat, Size
from llava_jax.data.workers import ask_all
from llava_jax.errors import Refused

# Refusals of each reason that are shown in full.
SHOWN = 3


def check_records(
    records: Choice, rows: RowFormat, needs: Needs, *, num_workers: int | None = None
) -> dict[str, list[str]]:
    """The details of every refused record by reason; nothing is written or cached."""
    opened = open_records(as_mix(records), as_written=rows.as_written)
    refusals: dict[int, tuple[str, str]] = {}
    tokens, tiles = np.zeros(len(opened), np.int32), np.zeros(len(opened), np.int32)
    ask = functools.partial(_check, opened, rows, needs)
    found = ask_all(ask, len(opened), label=f"checking {opened.path}", num_workers=num_workers)
    for i, (size, refusal) in enumerate(found):
        tokens[i], tiles[i] = size
        if refusal is not None:
            refusals[i] = refusal[0], f"{opened.describe(i)}: {refusal[1]}"
    for part, source in enumerate(opened.sources):
        start, end = opened.starts[part], opened.starts[part + 1]
        _report(source.path, tokens[start:end], {i: refusal for i, refusal in refusals.items() if start <= i < end})
    if len(opened.sources) > 1:
        _report("all of them", tokens, {})
    index = Index(records=opened, tokens=tokens, tiles=tiles, refused={}, fingerprint="")
    if len(index.usable):
        packed = pack(np.random.default_rng(0).permutation(index.usable), index, rows.capacity)
        share = tokens.sum(dtype=np.int64) / (len(packed) * rows.capacity.tokens)
        print(f"every record once packs into {len(packed):,} rows of {rows.capacity.tokens:,} tokens, {share:.1%} full")
    return _by_reason(refusals)


def _report(name: str, tokens: np.ndarray, refusals: Mapping[int, tuple[str, str]]) -> None:
    usable = int(np.count_nonzero(tokens))
    print(f"{name}: {len(tokens):,} records, {usable:,} usable, {len(tokens) - usable:,} refused")
    for reason, details in sorted(_by_reason(refusals).items()):
        print(f"  {reason}: {len(details):,}")
        for detail in details[:SHOWN]:
            print(f"    {detail}")


def _by_reason(refusals: Mapping[int, tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = collections.defaultdict(list)
    for reason, detail in refusals.values():
        found[reason].append(detail)
    return dict(found)


def _check(records: Records, rows: RowFormat, needs: Needs, i: int) -> tuple[Size, tuple[str, str] | None]:
    """What a record takes, or nothing, the reason and the detail of its refusal."""
    try:
        record = records[i]
        size = rows.measure(record, needs)
        rows.load(record, needs, np.random.default_rng(0))
        return size, None
    except Refused as refusal:
        return Size(0, 0), (refusal.reason, refusal.detail)
