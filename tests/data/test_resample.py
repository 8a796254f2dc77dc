"""Resampling: Pillow's bytes from products of matrices, for every shape, scale and thread."""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_jax.data import resample
from llava_jax.data.images import PAD_COLOUR
from llava_jax.data.resample import Line, pad_and_resize, resize

BICUBIC = Image.Resampling.BICUBIC


def _noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Half of its values are extremes, whose neighbours sums overshoot."""
    values = rng.integers(0, 256, (height, width, 3))
    return Image.fromarray(np.where(rng.random(values.shape) < 0.5, values // 128 * 255, values).astype(np.uint8))


def _padded(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("seed", range(10))
def test_bytes_are_those_of_pillow(seed: int):
    rng = np.random.default_rng(seed)
    for _ in range(30):
        image = _noise(rng, *map(int, rng.integers(1, 200, 2)))
        width, height = map(int, rng.integers(1, 200, 2))
        left, top = int(rng.integers(width)), int(rng.integers(height))
        box = left, top, int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1
        whole = image.resize((width, height), BICUBIC)
        np.testing.assert_array_equal(resize(image, (width, height)), np.asarray(whole), f"{image.size}")
        np.testing.assert_array_equal(resize(image, (width, height), box), np.asarray(whole.crop(box)), f"{image.size}")


@pytest.mark.parametrize("seed", range(10))
def test_bytes_of_padded_pictures_are_those_of_pillow(seed: int):
    rng = np.random.default_rng(seed)
    shapes = [((157, 268), 67), ((268, 157), 67)]
    shapes += [(tuple(map(int, rng.integers(1, 300, 2))), int(rng.integers(1, 150))) for _ in range(60)]
    for (width, height), size in shapes:
        image = _noise(rng, width, height)
        expected = np.asarray(_padded(image).resize((size, size), BICUBIC))
        np.testing.assert_array_equal(pad_and_resize(image, size, PAD_COLOUR), expected, f"{image.size} to {size}")


@pytest.mark.parametrize(
    "size", [(640, 480), (480, 640), (640, 427), (1300, 1000), (1000, 1400), (335, 337), (60, 336)]
)
def test_bytes_of_photographs_are_those_of_pillow_at_the_towers_size(size: tuple[int, int]):
    rng = np.random.default_rng(0)
    # Smooth, so that many sums are near each other and some at a half.
    image = _noise(rng, 24, 18).resize(size, Image.Resampling.LANCZOS)
    width, height = (336 * side // min(size) for side in size)
    box = ((width - 336) // 2, (height - 336) // 2, (width + 336) // 2, (height + 336) // 2)
    whole = image.resize((width, height), BICUBIC)
    np.testing.assert_array_equal(resize(image, (width, height), box), np.asarray(whole.crop(box)))
    expected = np.asarray(_padded(image).resize((336, 336), BICUBIC))
    np.testing.assert_array_equal(pad_and_resize(image, 336, PAD_COLOUR), expected)


def test_halves_go_up_as_in_pillow():
    # Halved, steps between even and odd values end at exact halves.
    image = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2).repeat(4, 0))
    for width in (64, 128, 512):
        sums = np.asarray(image.convert("L").convert("F").resize((width, 4), BICUBIC))
        found = resize(image, (width, 4))
        np.testing.assert_array_equal(found, np.asarray(image.resize((width, 4), BICUBIC)))
        halves = np.abs(sums % 1 - 0.5) < 1e-5
        assert width == 512 or halves.any()
        assert (found[..., 0][halves] >= sums[halves]).all()


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1024, 768), (300, 200)])
def test_usual_pictures_are_not_left_to_pillow(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    plain = Image.Image.resize

    def refuse(image: Image.Image, *args: Any, **options: Any) -> Image.Image:
        assert image.mode != "RGB"
        return plain(image, *args, **options)

    image = Image.new("RGB", size)
    monkeypatch.setattr(Image.Image, "resize", refuse)
    width, height = (336 * side // min(size) for side in size)
    resize(image, (width, height))
    pad_and_resize(image, 336, PAD_COLOUR)


def test_only_places_that_see_the_picture_are_computed(monkeypatch: pytest.MonkeyPatch):
    computed: list[int] = []
    down = Line.down
    monkeypatch.setattr(Line, "down", lambda line, numbers: computed.append(line.length) or down(line, numbers))
    pad_and_resize(Image.new("RGB", (640, 320)), 336, PAD_COLOUR)
    assert set(computed) <= set(range(168, 182))


def _kept_by(work: Callable[[], object]) -> dict[str, np.ndarray]:
    """The arrays that a thread keeps after this work."""
    kept: dict[str, np.ndarray] = {}

    def run() -> None:
        work()
        kept.update(vars(resample._kept))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return kept


def test_memory_serves_smaller_pictures_too():
    images = [Image.new("RGB", size) for size in ((640, 480), (500, 375), (300, 200))]
    first = {name: array.size for name, array in _kept_by(lambda: resize(images[0], (448, 336))).items()}
    every = _kept_by(lambda: [resize(image, (448, 336)) for image in images])
    assert {name: array.size for name, array in every.items()} == first


@pytest.mark.parametrize("size", [28, 336, 2304])
def test_little_memory_is_kept_of_the_largest_pictures(size: int):
    large = Image.new("RGB", (4_000, 3_000))

    def work() -> None:
        for image in (large, large.transpose(Image.Transpose.TRANSPOSE), large.resize((4_000, 20))):
            pad_and_resize(image, size, PAD_COLOUR)
            resize(image, (size, size))
            resize(image, (3 * size, size), (size, 0, 2 * size, size))

    # As float64 the picture takes 96 MB a band.
    assert sum(array.nbytes for array in _kept_by(work).values()) < 50_000_000


def test_a_thin_picture_is_not_padded_before_its_rows_are_resampled(monkeypatch: pytest.MonkeyPatch):
    """Padded, it would be as high as it is wide, 400 MB."""
    thin = Image.new("RGB", (10_000, 50))
    made: list[tuple[int, int]] = []
    new = Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *rest: made.append(size) or new(mode, size, *rest))
    pad_and_resize(thin, 336, PAD_COLOUR)
    assert made == [(336, 10_000)]


def test_columns_that_are_cut_away_are_not_resampled(monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[int, int]] = []
    plain = Image.Image.resize

    def watch(image: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        made.append(size)
        return plain(image, size, *rest)

    wide = Image.new("RGB", (6_000, 1_500))
    monkeypatch.setattr(Image.Image, "resize", watch)
    resize(wide, (1_344, 336), (504, 0, 840, 336))
    assert made == [(1_344, 1_500), (336, 336)]


def test_threads_do_not_share_memory():
    rng = np.random.default_rng(0)
    images = [_noise(rng, *map(int, rng.integers(100, 300, 2))) for _ in range(64)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda image: resize(image, (112, 112)), images))
    for image, tile in zip(images, found, strict=True):
        np.testing.assert_array_equal(tile, np.asarray(image.resize((112, 112), BICUBIC)))


@pytest.mark.parametrize(("old", "new"), [(640, 336), (336, 640), (7, 300), (1344, 336), (5, 5), (1, 9), (9, 1)])
def test_a_part_of_a_line_reads_what_its_places_need(old: int, new: int):
    whole = Line.between(old, new, 0, new)
    pixels = np.random.default_rng(0).integers(0, 256, (3, old)).astype(float)
    every = whole.across(pixels[:, whole.reads]).copy()
    for first in {0, new // 3, new - 1}:
        part = Line.between(old, new, first, new)
        assert part.reads.stop == old
        np.testing.assert_array_equal(part.across(pixels[:, part.reads]), every[:, first:])
