"""The plan of a run: which records share which row of which step, before anything is read."""

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from llava_jax.data.index import Index
from llava_jax.data.rows import Size
from llava_jax.errors import DataError

# Rows that stay open while packing; more fill rows better and cost planning time.
OPEN_ROWS = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of record numbers, `rows_per_step` of them a step; a row without records is padding.

    It depends on the records' sizes, the seed and the batch alone, never on hosts, workers or devices, so a
    step's number is the whole position in the data.
    """

    records: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " r"]
    rows_per_step: int
    seed: int

    @property
    def num_rows(self) -> int:
        return len(self.starts) - 1

    @property
    def num_steps(self) -> int:
        return self.num_rows // self.rows_per_step

    @functools.cached_property
    def most_records(self) -> int:
        """The most records that any row holds."""
        return int(np.diff(self.starts).max())

    def rows_computed(self, accumulation: int) -> Int[np.ndarray, " s"]:
        """Rows of each step in those of its micro-batches that hold a record; the others, the last, are skipped."""
        used = (np.diff(self.starts) > 0).reshape(-1, self.rows_per_step).sum(axis=1)
        at_a_time = self.rows_per_step // accumulation
        return -(-used // at_a_time) * at_a_time

    def row(self, number: int) -> Int[np.ndarray, " k"]:
        """Numbers of the records in a row."""
        return self.records[self.starts[number] : self.starts[number + 1]]

    def num_records(self, first_step: int, step: int) -> int:
        """How many records the steps from `first_step` to before `step` hold."""
        first, last = (self.starts[number * self.rows_per_step] for number in (first_step, step))
        return int(last - first)

    def fingerprint(self) -> str:
        """Says whether two runs read the same records in the same rows."""
        # Empty rows at the end of a step are left out: their number follows the devices, which may change on resume.
        steps = np.arange(self.num_rows) // self.rows_per_step
        lengths = np.diff(self.starts)
        digest = hashlib.sha256(repr((self.num_steps, self.seed)).encode())
        for array in (self.records, lengths[lengths > 0], steps[lengths > 0]):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()


def make_plan(
    index: Index,
    capacity: Size,
    *,
    seed: int,
    shuffle: bool,
    batch_rows: int | None,
    batch_records: int | None,
    epochs: int | None,
    steps: int | None,
    rows_multiple: int,
) -> Plan:
    """Packs epochs of the index's records into rows and rows into steps.

    With `batch_rows`, each epoch is packed as a whole and every step takes that many rows. With
    `batch_records`, every step takes that many records, as published recipes count them; the rows of a step
    are the most that any step needs, rounded up to `rows_multiple` (the number of devices that share them
    times the accumulation), the rest being padding; a refused record's place is taken by another, so that
    the number of steps stays the published one.
    """
    check_batch(batch_rows=batch_rows, batch_records=batch_records, epochs=epochs, steps=steps)
    if batch_rows is not None and batch_rows % rows_multiple:
        raise ValueError(
            f"data.batch_rows must be a multiple of {rows_multiple} (data-parallel devices times accumulation); "
            f"got {batch_rows}."
        )
    orders = _orders(index, seed=seed, shuffle=shuffle, fill_refused=batch_records is not None)
    groups: list[list[list[int]]] = []
    epoch = 0
    while epoch != epochs and (steps is None or len(groups) < steps):
        order = next(orders)
        if not len(order):
            raise DataError(
                f"An epoch must draw records; epoch {epoch} of {index.records.path} draws none. "
                "Raise the weights of the mix."
            )
        if batch_records is not None:
            parts = [order[i : i + batch_records] for i in range(0, len(order), batch_records)]
            groups += [pack(part, index, capacity) for part in parts]
        if batch_rows is not None:
            rows = pack(order, index, capacity)
            groups += [rows[i : i + batch_rows] for i in range(0, len(rows), batch_rows)]
        epoch += 1
    groups = groups[:steps]
    most = max(len(group) for group in groups)
    rows_per_step = batch_rows or -(-most // rows_multiple) * rows_multiple
    rows = [row for group in groups for row in group + [[]] * (rows_per_step - len(group))]
    return Plan(
        records=np.array([record for row in rows for record in row], np.int64),
        starts=np.cumsum([0, *map(len, rows)]),
        rows_per_step=rows_per_step,
        seed=seed,
    )


def check_batch(**sizes: int | None) -> None:
    """Raises `ValueError` unless one of `batch_rows` and `batch_records`, and one of `epochs` and `steps`, is set."""
    for pair in (("batch_rows", "batch_records"), ("epochs", "steps")):
        if sum(sizes[name] is not None for name in pair) != 1:
            got = ", ".join(f"{name}={sizes[name]}" for name in pair)
            raise ValueError(f"Set exactly one of data.{pair[0]} and data.{pair[1]}; got {got}.")
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"data.{name} must be at least 1; got {value}.")


def pack(order: Sequence[int] | Int[np.ndarray, " n"], index: Index, capacity: Size) -> list[list[int]]:
    """Best-fit packing: a record goes to the open row that it leaves fullest, or opens a new one.

    Example, capacity 10 tokens, sizes 6, 5, 4 in this order:
        6 -> row 0; 5 -> row 1; 4 -> row 0 (leaves 0 free there, 1 in row 1)   =>   [[0, 2], [1]]
    """
    order = np.asarray(order)
    rows: list[list[int]] = []
    free_tiles: list[int] = []
    # (free tokens, row), the fullest first: the first entry with room is the best fit, the oldest of equals.
    open_rows: list[tuple[int, int]] = []
    for record, tokens, tiles in zip(
        order.tolist(), index.tokens[order].tolist(), index.tiles[order].tolist(), strict=True
    ):
        at = bisect.bisect_left(open_rows, (tokens, 0))
        while at < len(open_rows) and free_tiles[open_rows[at][1]] < tiles:
            at += 1
        if at < len(open_rows):
            free, row = open_rows.pop(at)
        else:
            if len(open_rows) == OPEN_ROWS:
                del open_rows[0]
            free, row = capacity.tokens, len(rows)
            rows.append([])
            free_tiles.append(capacity.tiles)
        rows[row].append(record)
        free_tiles[row] -= tiles
        bisect.insort(open_rows, (free - tokens, row))
    return rows


def _orders(index: Index, *, seed: int, shuffle: bool, fill_refused: bool) -> Iterator[Int[np.ndarray, " n"]]:
    """The records of each epoch in the order in which they are packed."""
    usable, weights = index.usable, index.records.weights
    whole, rest = np.divmod(weights[usable], 1.0)
    epoch = 0
    while True:
        rng = np.random.default_rng((seed, epoch))
        order = np.repeat(usable, whole.astype(np.int64))
        if rest.any():
            order = np.sort(np.concatenate([order, usable[_draw(rest, rng)]]))
        missing = int(weights.sum() + 0.5) - len(order)
        if fill_refused and missing > 0 and len(usable) < len(index.records):
            order = np.concatenate([order, rng.choice(order, missing)])
        yield rng.permutation(order) if shuffle else order
        epoch += 1


def _draw(shares: Float[np.ndarray, " n"], rng: np.random.Generator) -> Int[np.ndarray, " k"]:
    """Each number with the chance of its share; of numbers with equal shares as many as that makes, give or take one.

    Example: shares [0.5, 0.5, 0, 0.5, 0.5] give two of the numbers 0, 1, 3, 4.
    """
    order = np.lexsort((rng.random(len(shares)), shares))
    steps = np.floor(np.cumsum(shares[order]) + 0.5)
    return order[np.diff(steps, prepend=0.0) > 0]
