"""Reads every record of a file once, pictures decoded, and counts what is refused, by reason."""

import collections
import sys

import numpy as np
from tqdm import tqdm

from llava_jax.data.records import RecordFile, find_spans
from llava_jax.data.rows import Needs, RowFormat
from llava_jax.errors import Refused

# Refusals of each reason that are shown in full.
SHOWN = 3


def check_records(path: str, rows: RowFormat, needs: Needs) -> dict[str, list[str]]:
    """The details of every refused record by reason; nothing is written or cached."""
    records = RecordFile(path, find_spans(path), as_written=rows.as_written)
    refused: dict[str, list[str]] = collections.defaultdict(list)
    for i in tqdm(range(len(records)), desc=f"checking {path}", unit="record", disable=None, file=sys.stderr):
        try:
            record = records[i]
            rows.measure(record, needs)
            rows.load(record, needs, np.random.default_rng(0))
        except Refused as refusal:
            refused[refusal.reason].append(f"record {i}: {refusal.detail}")
    num_refused = sum(map(len, refused.values()))
    print(f"{path}: {len(records):,} records, {len(records) - num_refused:,} usable, {num_refused:,} refused")
    for reason, details in sorted(refused.items()):
        print(f"  {reason}: {len(details):,}")
        for detail in details[:SHOWN]:
            print(f"    {detail}")
    return dict(refused)
