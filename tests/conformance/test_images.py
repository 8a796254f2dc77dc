"""Images: pixels of every mode, the choice of a resolution, and what unpadding keeps."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float
from PIL import Image

from llava_jax.convert.fields import Fields
from llava_jax.convert.preprocessing import image_mode_of_original
from llava_jax.data.anyres import AnyRes, unpad
from llava_jax.data.images import ImageMode, cut_tiles, open_image
from llava_jax.errors import Refused
from llava_jax.models.clip import normalise
from tests.conformance.report import Case, expect_fields, not_built, reads

COMPANIONS = (
    "images/files/*",
    "images/pixels_llava.npz",
    "images/pixels_next.npz",
    "images/preprocessor_config_336.json",
)
PICTURE_FIELDS = ("file", "mode", "size_wh", "exif_orientation", "rgb_sum", "rgb_corners")
CASE_FIELDS = (
    "key",
    "processor_size",
    "mode",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "shape",
    "dtype",
    "error",
    "best_resolution_wh",
    "grid_wh",
    "num_tiles",
)
LATER = re.compile(r"anyres_max_\d+|highres|crop_split")
PIXELS = 1e-5
SUMS = 1e-3


def _by_case(path: Path) -> Iterator[tuple[str, Any]]:
    """One record for every picture and one for every way in which it is prepared."""
    for picture in json.loads(path.read_text()):
        cases = picture.pop("cases")
        yield picture["file"], picture
        for case in cases:
            yield case["key"], case


@reads("images/images_llava.json", "images/images_next.json", cases=_by_case)
def test_picture(case: Case, under_original: Callable[[str], None]):
    record = case.record
    folder = case.root / "images"
    if "file" in record:
        expect_fields(record, *PICTURE_FIELDS)
        _check_decoder(record, folder / "files" / record["file"])
        return
    expect_fields(record, *CASE_FIELDS)
    mode = _mode(record)
    size = record["processor_size"]
    image = open_image(folder / "files" / record["key"].split("/")[0])
    num_rows = max(image.size) if mode == "pad" else image.height
    if record["error"] is not None and (num_rows != 1 or isinstance(mode, AnyRes)):
        with pytest.raises(Refused):
            cut_tiles(image, size=size, mode=mode)
        return
    tiles = cut_tiles(image, size=size, mode=mode)
    if record["error"] is not None:
        # transformers 4.37 takes a single row of pixels for a single colour, and stops.
        assert tiles.shape == (1, size, size, 3)
        return
    if num_rows == 3 and not isinstance(mode, AnyRes):
        under_original("three rows of pixels read as three colours")
        rows = cut_tiles(image, size=3, mode="pad")[0] if mode == "pad" else np.asarray(image.convert("RGB"))
        turned = Image.fromarray(np.ascontiguousarray(rows.transpose(1, 2, 0)))
        tiles = cut_tiles(turned, size=size, mode="square")
    if isinstance(mode, AnyRes):
        assert list(mode.resolution(image.size)) == record["best_resolution_wh"]
        assert list(mode.grid(image.size, size)) == record["grid_wh"]
        assert len(tiles) == record["num_tiles"]
    pixels = np.moveaxis(np.asarray(normalise(jnp.asarray(tiles), jnp.float32)), -1, 1)
    arrays = np.load(folder / f"{Path(case.family).name.replace('images', 'pixels')}.npz")
    found = {name.removeprefix(f"{record['key']}/"): arrays[name] for name in arrays if _belongs(name, record["key"])}
    _check_pixels(pixels if isinstance(mode, AnyRes) else pixels[0], record, found)


def _mode(record: Mapping[str, Any]) -> ImageMode:
    name = record["image_aspect_ratio"] or "square"
    if LATER.fullmatch(name):
        not_built(f"image mode {re.sub(r'[0-9]+', 'N', name)}")
    names = ("image_aspect_ratio", "image_grid_pinpoints")
    return image_mode_of_original(Fields({name: record[name] for name in names}, "the record"))


def _belongs(name: str, key: str) -> bool:
    return name.rpartition("/")[0] == key


def _check_decoder(record: Mapping[str, Any], path: Path) -> None:
    image = open_image(path)
    assert image.mode == record["mode"]
    assert list(image.size) == record["size_wh"]
    assert image.getexif().get(0x0112) == record["exif_orientation"]
    rgb = np.asarray(image.convert("RGB"))
    assert rgb.sum((0, 1)).tolist() == record["rgb_sum"]
    assert rgb[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == record["rgb_corners"]


def _check_pixels(
    pixels: Float[np.ndarray, "*tiles 3 height width"], record: Mapping[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    assert list(pixels.shape) == record["shape"]
    assert str(pixels.dtype) == record["dtype"]
    height, width = np.arange(pixels.shape[-2]), np.arange(pixels.shape[-1])
    weights = np.cos(0.37 * height)[:, None] * np.sin(0.23 * width + 0.5)
    exact = pixels.astype(np.float64)
    area = pixels.shape[-1] * pixels.shape[-2]
    checked = {
        "full": (pixels, PIXELS),
        "sum": (exact.sum((-2, -1)), PIXELS * area),
        "mean": (exact.mean((-2, -1)), PIXELS),
        "std": (exact.std((-2, -1)), PIXELS),
        "min": (pixels.min((-2, -1)), PIXELS),
        "max": (pixels.max((-2, -1)), PIXELS),
    }
    if "sample" in arrays:
        checked["sample"] = (pixels[..., arrays.pop("rows"), :][..., arrays.pop("cols")], PIXELS)
    weighted = arrays.pop("weighted_sum")
    np.testing.assert_allclose((exact * weights).sum((-2, -1)), weighted, rtol=SUMS, atol=1e-7 * area)
    assert set(arrays) <= set(checked), f"unknown arrays: {sorted(set(arrays) - set(checked))}"
    assert {"full", "sample"} & set(arrays), "no pixels are recorded"
    for name, expected in arrays.items():
        value, tolerance = checked[name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance, err_msg=name)


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """One record for every line of the table, its columns by their first word."""
    table = json.loads(path.read_text())
    expect_fields(table, "columns", "rows", "pinpoints")
    names = [column.split()[0] for column in table["columns"]]
    pinpoints = {"pinpoints": table["pinpoints"]} if "pinpoints" in table else {}
    for i, row in enumerate(table["rows"]):
        yield str(i), dict(zip(names, row, strict=True)) | pinpoints


@reads("images/best_resolution.json", cases=_rows)
def test_best_resolution(case: Case):
    record = case.record
    expect_fields(
        record, "width", "height", "tile_size", "pinpoint_set", "best_w", "best_h", "grid_w", "grid_h", "pinpoints"
    )
    size, tile = (record["width"], record["height"]), record["tile_size"]
    sets = (record["pinpoints"][str(tile)], [(i * 336, j * 336) for i in range(1, 5) for j in range(1, 5)])
    pinpoints = tuple((width, height) for width, height in sets[record["pinpoint_set"]])
    mode = AnyRes(pinpoints=pinpoints, merge="spatial_unpad", rounding="original")
    assert mode.resolution(size) == (record["best_w"], record["best_h"])
    assert mode.grid(size, tile) == (record["grid_w"], record["grid_h"])


@reads("images/unpad.json", cases=_rows)
def test_unpad(case: Case):
    record = case.record
    names = ("original_width", "original_height", "grid_h", "grid_w")
    expect_fields(record, *names, "first_row_kept", "first_col_kept", "rows_kept", "cols_kept")
    width, height, rows, columns = (record[name] for name in names)
    kept = np.arange(rows * columns).reshape(rows, columns)[unpad((width, height), (columns, rows), "original")]
    assert kept.shape == (record["rows_kept"], record["cols_kept"])
    if kept.size:
        assert divmod(kept[0, 0], columns) == (record["first_row_kept"], record["first_col_kept"])
