"""Grain reads the plan: batches of rows from any step on, the same on any number of hosts and workers."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import SupportsIndex

import numpy as np

from llava_jax.data.index import Index
from llava_jax.data.plan import Plan
from llava_jax.data.rows import Example, Needs, Row, RowFormat
from llava_jax.errors import DataError, Refused

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowReader:
    """The plan's rows as arrays, for one host: a random-access source that Grain slices and ships to its workers.

    Host `process` of `num_processes` reads its equal share of every step's rows, from `first_step` on.
    """

    index: Index
    plan: Plan
    rows: RowFormat
    needs: Needs
    first_step: int
    process: int
    num_processes: int

    def __len__(self) -> int:
        return (self.plan.num_steps - self.first_step) * self._rows_per_host

    def __getitem__(self, index: SupportsIndex) -> Row:
        """One row, with `record_ids` (-1 where there is none) and `num_replaced`."""
        step, place = divmod(int(index), self._rows_per_host)
        number = (self.first_step + step) * self.plan.rows_per_step + self.process * self._rows_per_host + place
        planned = self.plan.row(number)
        read = [self._read(int(record), seed=(self.plan.seed, number, i)) for i, record in enumerate(planned)]
        used = np.array([record for record, _ in read], np.int64)
        ids = np.full(self.plan.most_records, -1, np.int64)
        ids[: len(used)] = used
        row = self.rows.assemble([example for _, example in read], self.needs)
        return row | {"record_ids": ids, "num_replaced": np.int32((used != planned).sum())}

    def _read(self, record: int, *, seed: tuple[int, ...]) -> tuple[int, Example]:
        """The record, or the next usable one that takes no more room if its pixels turn out to be damaged.

        The choice depends on the index alone, so every host and worker makes the same one.
        """
        room = self.index.size(record)
        first, refusal = record, None
        for tried in (*range(first, len(self.index.records)), *range(first)):
            size = self.index.size(tried)
            if size.tokens == 0 or size.tokens > room.tokens or size.tiles > room.tiles:
                continue
            try:
                return tried, self.rows.load(self.index.records[tried], self.needs, np.random.default_rng(seed))
            except Refused as error:
                refusal = refusal or error
        raise DataError(
            f"A damaged record must have a substitute of at most {room}; record {record} of "
            f"{self.index.records.path} has none ({refusal}). Mend the data."
        )

    @property
    def _rows_per_host(self) -> int:
        return self.plan.rows_per_step // self.num_processes


def read_batches(reader: RowReader, *, num_workers: int) -> Iterator[Batch]:
    """This host's batches, step after step; `num_workers` processes read ahead, 0 reads in threads."""
    import grain

    # Threads overlap decoding with the step; the buffer bounds how far they run ahead. Rows become batches while
    # the data set is still random-access: workers share it by elements, and those must be whole steps.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    dataset = grain.MapDataset.source(reader).batch(reader.plan.rows_per_step // reader.num_processes)
    dataset = dataset.to_iter_dataset(options)
    if num_workers:
        _parse_absl_flags()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    batches = iter(dataset)
    with _no_accelerator_for_workers():
        first = next(batches, None)
    if first is not None:
        yield first
        yield from batches


def _parse_absl_flags() -> None:
    """Grain's workers read absl flags, which raise unless somebody has parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def _no_accelerator_for_workers() -> Iterator[None]:
    """A worker imports Grain, which imports JAX; it must not claim the accelerator that the parent holds."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = before
