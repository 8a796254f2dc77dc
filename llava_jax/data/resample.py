"""Pillow's bicubic resampling of RGB pictures, bit for bit, as products of small matrices.

Products keep a CPU's vector units busy, which Pillow's loops over single pixels leave idle.

Source: src/libImaging/Resample.c of Pillow (`precompute_coeffs`, `normalize_coeffs_8bpc`, `ImagingResampleInner`): sums
of integers along rows, then along columns, rounded to bytes after each, halves up.
"""

import dataclasses
import functools
import math
import threading

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

# Pillow's weights for bytes are multiples of 1 / UNIT (`PRECISION_BITS`); bicubic ones reach two pixels far.
UNIT = 1 << 22
REACH = 2
# Sums are multiples of 1 / UNIT, too. With weights larger by this share, far more than float64 rounds, they are nearest
# to the same bytes, but halves, which `np.rint` takes to even ones, are more than halves and go up as Pillow's do.
UP = 1 + 2.0**-32
# Places of the result that one product makes: more of them multiply more zeros, fewer call BLAS more often.
BLOCK = 8
# Rows of one product. A library for products may divide large ones between threads, of which readers have enough.
ROWS = 512
# Pillow is as fast above this scale, and where arrays of so many numbers leave a core's cache.
LARGEST_SCALE = 4
LARGEST_ARRAY = 1 << 21

Numbers = Float64[np.ndarray, "_ _"]


@dataclasses.dataclass(frozen=True)
class Line:
    """How places of a resampled line come from a line of pixels.

    `reads` are the pixels that they need. Each block has the part of those that its places need, the places, and the
    weights, [pixels, places].
    """

    reads: slice
    length: int
    blocks: tuple[tuple[slice, slice, Numbers], ...]

    @classmethod
    @functools.lru_cache(maxsize=128)
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

    @property
    def pixels(self) -> int:
        return self.reads.stop - self.reads.start

    def across(self, numbers: Float64[np.ndarray, "h pixels"]) -> Float64[np.ndarray, "h places"]:
        """Rows of what `reads` names, resampled."""
        sums = _memory("across", len(numbers), self.length)
        for start in range(0, len(numbers), ROWS):
            some = numbers[start : start + ROWS]
            for pixels, places, weights in self.blocks:
                np.matmul(some[:, pixels], weights, out=sums[start : start + ROWS, places])
        return _whole(sums)

    def down(self, numbers: Float64[np.ndarray, "pixels w"]) -> Float64[np.ndarray, "places w"]:
        """Columns of what `reads` names, resampled."""
        sums = _memory("down", self.length, numbers.shape[1])
        for pixels, places, weights in self.blocks:
            np.matmul(weights.T, numbers[pixels], out=sums[places])
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
    if not columns_first and rgb.size != size and max(rgb.width / width, rgb.height / height) <= LARGEST_SCALE:
        across, down = Line.between(rgb.width, width, left, right), Line.between(rgb.height, height, top, bottom)
        if _is_small(across, down):
            result = np.empty((bottom - top, right - left, 3), np.uint8)
            for channel, band in enumerate(_bands(rgb)):
                numbers = _memory("numbers", down.pixels, across.pixels)
                numbers[:] = band[down.reads, across.reads]
                result[..., channel] = down.down(across.across(numbers))
            return result
    if not columns_first:
        # Its own passes one by one: columns are resampled where they are kept.
        rgb = rgb.resize((width, rgb.height), Image.Resampling.BICUBIC).crop((left, 0, right, rgb.height))
        left, right, width = 0, right - left, right - left
    return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, right, bottom)))


def pad_and_resize(rgb: Image.Image, size: int, colour: tuple[int, int, int]) -> UInt8[np.ndarray, "size size 3"]:
    """The picture in the middle of a square of this colour, brought to `size` x `size`."""
    side = max(rgb.size)
    left, top = (side - rgb.width) // 2, (side - rgb.height) // 2
    if size != side <= LARGEST_SCALE * size:
        columns, rows = _seeing(side, size, left, rgb.width), _seeing(side, size, top, rgb.height)
        across, down = (Line.between(side, size, places.start, places.stop) for places in (columns, rows))
        if _is_small(across, down):
            result = np.array(Image.new("RGB", (size, size), colour))
            y, x = top - down.reads.start, left - across.reads.start
            for channel, band in enumerate(_bands(rgb)):
                numbers = _memory("numbers", down.pixels, across.pixels)
                numbers[:] = colour[channel]
                numbers[y : y + rgb.height, x : x + rgb.width] = band
                result[rows, columns, channel] = down.down(across.across(numbers))
            return result
    if top:
        # Rows of padding stay what they are: the picture's alone are resampled.
        rgb, left = rgb.resize((size, rgb.height), Image.Resampling.BICUBIC), 0
    square = Image.new("RGB", (size if top else side, side), colour)
    square.paste(rgb, (left, top))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _seeing(old: int, new: int, start: int, length: int) -> slice:
    """Places that include all which see one of these pixels, and whose `reads` hold all of them."""
    margin = REACH + math.ceil((REACH + 1) * new / old)
    return slice(max(start * new // old - margin, 0), min(-(-(start + length) * new // old) + margin, new))


def _is_small(across: Line, down: Line) -> bool:
    """Whether none of the arrays is larger than a thread should keep."""
    return max(down.pixels * max(across.pixels, across.length), down.length * across.length) <= LARGEST_ARRAY


def _bands(rgb: Image.Image) -> list[UInt8[np.ndarray, "h w"]]:
    return [np.frombuffer(rgb.tobytes("raw", band), np.uint8).reshape(rgb.height, rgb.width) for band in "RGB"]
