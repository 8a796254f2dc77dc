"""An array that still lies in its file, or is still to be computed: what conversion handles one at a time."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llava_jax.errors import CheckpointError

# Elements of a block: 64 MiB in float32.
_BLOCK = 1 << 24
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Shape, dtype, where it comes from, and a function that brings its values into reach.

    `slow_axis` is the axis along which a part is one piece of the file.

    What `view` returns lives as long as the caller holds it: a mapped file is let go, a computed value freed.
    numpy takes a tensor as it is (`np.asarray`), and an index reads no more than its part of the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    origin: str
    view: Callable[[], np.ndarray]
    slow_axis: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.view(), dtype=dtype, copy=copy)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.view()[index]

    def changed(self, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> "Tensor":
        """The same values in another shape or order."""
        return dataclasses.replace(self, shape=shape, view=lambda: change(self.view()))

    def turned(self) -> "Tensor":
        """A matrix with its axes exchanged."""
        return dataclasses.replace(self.changed(self.shape[::-1], np.transpose), slow_axis=1 - self.slow_axis)


def stored(path: Path, key: str, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> Tensor:
    """A tensor whose bytes lie in C order in a file from `offset` on; each view maps only them."""

    def view() -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, dtype)
        try:
            return np.asarray(np.memmap(path, dtype, "r", offset, shape or (1,))).reshape(shape)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} changed while it was read: {error}. Read {key} again.") from error

    return Tensor(shape=shape, dtype=dtype, origin=f"{path}: {key}", view=view)


def in_memory(value: np.ndarray, origin: str) -> Tensor:
    return Tensor(shape=value.shape, dtype=value.dtype, origin=origin, view=lambda: value)


def add_in_float32(values: np.ndarray, addend: Callable[[slice], np.ndarray]) -> np.ndarray:
    """A copy of a matrix or vector with `addend(rows)` added to every block of rows, rounded once.

    In blocks, so that no whole tensor ever exists in float32.
    """
    result = np.array(values)
    step = max(1, _BLOCK * len(values) // max(1, values.size))
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        result[rows] = (values[rows].astype(np.float32) + addend(rows)).astype(values.dtype)
    return result
