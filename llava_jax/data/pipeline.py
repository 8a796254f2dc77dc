"""Grain reads the plan: batches of rows from any step on, the same on any number of hosts and workers."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import zlib
from collections.abc import Generator, Iterator
from multiprocessing import resource_tracker
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int

from llava_jax.data.index import Index
from llava_jax.data.plan import Plan
from llava_jax.data.rows import Example, Needs, Row, RowFormat
from llava_jax.data.workers import end_workers, follow_the_parent_alone
from llava_jax.errors import DataError, Refused

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowReader:
    """The plan's rows as arrays, for one host: a random-access source that Grain slices and ships to its workers.

    The host reads the rows at `places` of every step, counted from 0 in the step, from `first_step` on.
    """

    index: Index
    plan: Plan
    rows: RowFormat
    needs: Needs
    first_step: int
    places: Int[np.ndarray, " k"]

    def __len__(self) -> int:
        return (self.plan.num_steps - self.first_step) * len(self.places)

    def __getitem__(self, index: SupportsIndex) -> Row:
        """One row, with `record_ids` (-1 where there is none), a checksum of them, and `num_replaced`."""
        step, at = divmod(int(index), len(self.places))
        step, place = self.first_step + step, int(self.places[at])
        number = step * self.plan.rows_per_step + place
        planned = self.plan.row(number)
        # By its place among all records of the plan: that of its row depends on the number of devices.
        first = int(self.plan.starts[number])
        read = [self._read(int(record), seed=(self.plan.seed, first + i)) for i, record in enumerate(planned)]
        used = np.array([record for record, _ in read], np.int64)
        ids = np.full(self.plan.most_records, -1, np.int64)
        ids[: len(used)] = used
        row = self.rows.assemble([example for _, example in read], self.needs)
        # Checksums of rows can be added up, whichever hosts the rows lie on, and however many are padding.
        told = np.array([step, place, *used], np.int64)
        checksum = np.uint32(zlib.crc32(told.tobytes())) if len(used) else np.uint32(0)
        replaced = np.int32((used != planned).sum())
        return row | {"record_ids": ids, "checksum": checksum, "num_replaced": replaced}

    def _read(self, record: int, *, seed: tuple[int, ...]) -> tuple[int, Example]:
        """The record, or the next usable one that takes no more room if its pixels turn out to be damaged.

        The choice depends on the index alone, so every host and worker makes the same one.
        """
        room = self.index.size(record)
        first, refusal = record, None
        for tried in itertools.chain(range(first, len(self.index.records)), range(first)):
            size = self.index.size(tried)
            if size.tokens == 0 or size.tokens > room.tokens or size.tiles > room.tiles:
                continue
            try:
                return tried, self.rows.load(self.index.records[tried], self.needs, np.random.default_rng(seed))
            except Refused as error:
                refusal = refusal or error
        raise DataError(
            f"A damaged record must have a substitute of at most {room}; {self.index.records.describe(record)} "
            f"has none ({refusal}). Mend the data."
        )


def read_batches(reader: RowReader, *, num_workers: int) -> Generator[Batch, None, None]:
    """This host's batches, step after step; `num_workers` processes read ahead, 0 reads in threads."""
    import grain

    # Threads overlap decoding with the step; the buffer bounds how far they run ahead. Rows become batches while
    # the data set is still random-access: workers share it by elements, and those must be whole steps.
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    dataset = grain.MapDataset.source(reader).batch(len(reader.places)).to_iter_dataset(options)
    if num_workers:
        _parse_absl_flags()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), _start_worker)
    others = set(multiprocessing.active_children())
    with _for_workers():
        batches = iter(dataset)
    try:
        with _for_workers():
            first = next(batches, None)
        if first is not None:
            yield first
            yield from batches
    finally:
        # Asked to end, a worker first finishes its imports and the rows it has begun; Grain waits for one after the
        # other, 25 seconds each. What a scheduler grants is less, and nobody will read those rows.
        end_workers(set(multiprocessing.active_children()) - others)
        batches.close()


def _start_worker(worker: int, num_workers: int) -> None:
    del worker, num_workers
    follow_the_parent_alone()


def _parse_absl_flags() -> None:
    """Grain's workers read absl flags, which raise unless somebody has parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def _for_workers() -> Iterator[None]:
    """What workers inherit: a JAX that leaves the parent's accelerator alone, and a blocked SIGTERM while they start.

    A worker imports Grain, which imports JAX. The parent's other threads still take the signal.
    """
    # Its start would unblock the signal in the thread that starts the first worker. It would also warn of the arrays
    # that workers that are ended leave in shared memory, which it removes.
    with _variable("PYTHONWARNINGS", "ignore"):
        resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        with _variable("JAX_PLATFORMS", "cpu"):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """A variable of the environment, for processes that are started inside the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
