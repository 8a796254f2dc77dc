"""Pillow's bicubic resampling of RGB pictures, bit for bit, as products of small matrices.

Products keep a CPU's vector units busy, which Pillow's loops over single pixels leave idle.

Source: src/libImaging/Resample.c of Pillow (`precompute_coeffs`, `normalize_coeffs_8bpc`, `ImagingResampleInner`): rows
first, then columns, sums of integers, halves rounded up to a byte after each.
"""

import dataclasses
import functools
import math
import threading
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

# Pillow's weights for bytes are multiples of 1 / UNIT (`PRECISION_BITS`); bicubic ones reach two pixels far.
UNIT = 1 << 22
REACH = 2
# Sums are multiples of 1 / UNIT, too. Larger by this share they are still nearest to the same byte, but halves, which
# `np.rint` takes to even bytes, are no halves any more and go up as Pillow's do.
UP = 1 + 2.0**-32
# Places of the result that one product makes: more of them multiply more zeros, fewer call BLAS more often.
BLOCK = 8
# Rows that one product takes: a library for them may divide larger ones between threads, of which readers have enough.
ROWS = 512
# From this scale on Pillow is as fast, and its memory does not grow with the picture's.
LARGEST_SCALE = 4

Bytes = UInt8[np.ndarray, "_ _"]
Numbers = Float64[np.ndarray, "_ _"]


@dataclasses.dataclass(frozen=True)
class Line:
    """How places of a resampled line come from a line of pixels.

    `reads` is what they need of the old line. A block is a part of that, the places that need no more, and weights,
    [pixels, places].
    """

    reads: slice
    length: int
    blocks: tuple[tuple[slice, slice, Numbers], ...]

    @classmethod
    @functools.lru_cache(maxsize=256)
    def between(cls, old: int, new: int, first: int, last: int) -> "Line":
        """Places `first` up to `last` of the `new` ones that `old` pixels are resampled to."""
        scale = old / new
        period = 2 * math.ceil(REACH * max(scale, 1)) + 1
        # Pillow itself tells its weights: for pictures of 32-bit integers it has the same, and where one pixel in reach
        # is UNIT and the others are 0, the sum is that pixel's weight, rounded as the weights for bytes are.
        points = np.zeros((period, old), np.int32)
        points[np.arange(old) % period, np.arange(old)] = UNIT
        found = np.asarray(Image.fromarray(points).resize((new, period), Image.Resampling.BICUBIC)) * (UP / UNIT)
        starts = np.arange(first, last, BLOCK)
        # As many pixels as the places of a block have in reach.
        count = min(period + math.ceil((BLOCK - 1) * scale) + 1, old)
        begins = np.clip(np.floor((starts + 0.5) * scale - period / 2).astype(int), 0, old - count)
        pixels = (begins[:, None] + np.arange(count))[:, :, None]
        places = np.minimum(starts[:, None] + np.arange(BLOCK), last - 1)[:, None]
        near = np.abs(pixels + 0.5 - (places + 0.5) * scale) < period / 2
        weights = np.where(near, found[pixels % period, places], 0)
        blocks = []
        for begin, start, some in zip((begins - begins[0]).tolist(), (starts - first).tolist(), weights, strict=True):
            end = min(start + BLOCK, last - first)
            blocks.append((slice(begin, begin + count), slice(start, end), some[:, : end - start]))
        return cls(slice(int(begins[0]), int(begins[-1]) + count), last - first, tuple(blocks))

    def across(self, band: UInt8[np.ndarray, "h pixels"]) -> Float64[np.ndarray, "h places"]:
        """Rows of what `reads` names, resampled."""
        sums = _memory("across", len(band), self.length)
        for start in range(0, len(band), ROWS):
            some = band[start : start + ROWS]
            numbers = _memory("numbers", *some.shape)
            numbers[:] = some
            for pixels, places, weights in self.blocks:
                np.matmul(numbers[:, pixels], weights, out=sums[start : start + ROWS, places])
        return _whole(sums)

    def down(self, band: Float64[np.ndarray, "pixels w"]) -> Float64[np.ndarray, "places w"]:
        """Columns of what `reads` names, resampled."""
        sums = _memory("down", self.length, band.shape[1])
        for pixels, places, weights in self.blocks:
            np.matmul(weights.T, band[pixels], out=sums[places])
        return _whole(sums)


def _whole(sums: Numbers) -> Numbers:
    """The bytes nearest to sums, still as numbers, in place."""
    return np.rint(np.clip(sums, 0, 255, out=sums), out=sums)


_kept = threading.local()


def _memory(name: str, height: int, width: int) -> Numbers:
    """An array to be filled. A thread's pictures share it: new pages would take longer than the products."""
    kept = getattr(_kept, name, None)
    if kept is None or kept.size < height * width:
        kept = np.empty(height * width)
        setattr(_kept, name, kept)
    return kept[: height * width].reshape(height, width)


def resize(
    rgb: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None
) -> UInt8[np.ndarray, "height width 3"]:
    """`rgb.resize(size, BICUBIC).crop(box)`; the size is (width, height), the box (left, top, right, bottom)."""
    width, height = size
    left, top, right, bottom = box or (0, 0, width, height)
    fewer_rows, fewer_columns = rgb.height - height, rgb.width - width
    # Of pictures that lose rows above all, Pillow 13 resamples columns first; earlier versions do not.
    columns_first = fewer_rows > max(0, 2 * fewer_columns)
    if columns_first or max(rgb.width / width, rgb.height / height) > LARGEST_SCALE:
        return np.asarray(rgb.resize(size, Image.Resampling.BICUBIC).crop((left, top, right, bottom)))
    across, down = Line.between(rgb.width, width, left, right), Line.between(rgb.height, height, top, bottom)
    result = np.empty((bottom - top, right - left, 3), np.uint8)
    _fill(result, (band[down.reads, across.reads] for band in _split(rgb)), across, down)
    return result


def pad_and_resize(rgb: Image.Image, size: int, colour: tuple[int, int, int]) -> UInt8[np.ndarray, "size size 3"]:
    """The picture in the middle of a square of this colour, brought to `size` x `size`."""
    side = max(rgb.size)
    left, top = (side - rgb.width) // 2, (side - rgb.height) // 2
    if side > LARGEST_SCALE * size:
        square = Image.new("RGB", (side, side), colour)
        square.paste(rgb, (left, top))
        return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    columns, rows = _places(side, size, left, rgb.width), _places(side, size, top, rgb.height)
    across, down = (Line.between(side, size, places.start, places.stop) for places in (columns, rows))
    result = np.array(Image.new("RGB", (size, size), colour))

    def framed(band: Bytes, value: int) -> Bytes:
        frame = np.full((down.reads.stop - down.reads.start, across.reads.stop - across.reads.start), value, np.uint8)
        y, x = top - down.reads.start, left - across.reads.start
        frame[y : y + rgb.height, x : x + rgb.width] = band
        return frame

    _fill(result[rows, columns], map(framed, _split(rgb), colour), across, down)
    return result


def _places(old: int, new: int, start: int, length: int) -> slice:
    """Places that all those which see some of these pixels are among; their `reads` hold the pixels."""
    margin = REACH + 2 + math.ceil((REACH + 2) * new / old)
    return slice(max(start * new // old - margin, 0), min(-(-(start + length) * new // old) + margin, new))


def _split(rgb: Image.Image) -> list[Bytes]:
    return [np.frombuffer(rgb.tobytes("raw", band), np.uint8).reshape(rgb.height, rgb.width) for band in "RGB"]


def _fill(result: UInt8[np.ndarray, "h w 3"], bands: Iterable[Bytes], across: Line, down: Line) -> None:
    for channel, band in enumerate(bands):
        result[..., channel] = down.down(across.across(band))
