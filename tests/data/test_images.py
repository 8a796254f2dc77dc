"""Pictures: pixels against Hugging Face, hostile files, names that try to escape."""

import dataclasses
import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from llava_jax.data.anyres import AnyRes
from llava_jax.data.images import (
    MAX_ASPECT,
    PAD_COLOUR,
    check_mode,
    cut_tiles,
    decode,
    find_layout,
    open_image,
    resolve,
)
from llava_jax.errors import Refused
from llava_jax.models.clip import normalise
from tests.tiny import LLAVA

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")


def _picture(rng: np.random.Generator, width: int, height: int, mode: str = "RGB") -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65_536, (height, width)).astype(np.uint16))
    if mode == "LA":
        return Image.fromarray(rng.integers(0, 256, (height, width, 2)).astype(np.uint8), "LA")
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).convert(mode)


def _bytes(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_header(width: int, height: int) -> bytes:
    """A picture that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + pixels + _chunk(b"IEND", b"")


def _normalised(image: Image.Image, size: int, mode: str) -> np.ndarray:
    """Channels first, as transformers and the recordings have them."""
    tile = decode(image, size=size, mode=mode)
    return np.moveaxis(np.asarray(normalise(jnp.asarray(tile)[None], np.float32)[0]), -1, 0)


def _expand2square(image: Image.Image) -> Image.Image:
    """`expand2square` of the original (llava/mm_utils.py), word for word."""
    width, height = image.size
    if width == height:
        return image
    if width > height:
        result = Image.new(image.mode, (width, width), PAD_COLOUR)
        result.paste(image, (0, (width - height) // 2))
        return result
    result = Image.new(image.mode, (height, height), PAD_COLOUR)
    result.paste(image, ((height - width) // 2, 0))
    return result


@pytest.fixture(scope="module")
def processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil


def test_pictures_are_those_resampled_at_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        width, height = map(int, rng.integers(2, 400, 2))
        size = int(rng.choice([14, 56, 112]))
        image = _picture(rng, width, height, mode="RGB")
        short = min(width, height)
        scaled = image.resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
        left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
        square = _expand2square(image).resize((size, size), Image.Resampling.BICUBIC)
        for mode, whole in (("square", scaled.crop((left, top, left + size, top + size))), ("pad", square)):
            np.testing.assert_array_equal(decode(image, size=size, mode=mode), np.asarray(whole), f"{width}x{height}")


@pytest.mark.parametrize("seed", range(24))
def test_pixels_are_those_of_the_hugging_face_processor(processor, seed: int):
    rng = np.random.default_rng(seed)
    image = _picture(rng, *map(int, rng.integers(2, 150, 2)), mode=MODES[seed % len(MODES)])
    size = (14, 28, 56)[seed % 3]
    reference = processor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    # transformers 5 lays alpha over white; the original, and we, drop it.
    shown = image.convert("RGB")
    for mode, source in (("square", shown), ("pad", _expand2square(shown))):
        expected = reference(source, return_tensors="np")["pixel_values"][0]
        ours = _normalised(image, size, mode)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_pictures_share_their_memory():
    """A picture of 640 x 480 asks for no new pages of memory, of which its arrays take hundreds."""
    code = """
import io, resource
from PIL import Image
from llava_jax.data.images import decode, open_image
buffer = io.BytesIO()
Image.effect_noise((640, 480), 50).convert("RGB").save(buffer, "JPEG")
for number in range(60):
    if number == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    decode(open_image(buffer.getvalue()), size=336, mode="pad")
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 40)
"""
    variables = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True)
    assert float(done.stdout) < 20


def test_orientation_is_not_applied_and_alpha_is_dropped(tmp_path: Path):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = _picture(rng, 40, 20)
    image.save(tmp_path / "turned.jpg", exif=exif)
    plain = Image.open(io.BytesIO((tmp_path / "turned.jpg").read_bytes())).convert("RGB")
    np.testing.assert_array_equal(
        decode(open_image(tmp_path / "turned.jpg"), size=20, mode="square"), np.asarray(plain)[:, 10:30]
    )
    alpha = _picture(rng, 20, 20, "RGBA")
    alpha.putalpha(0)
    alpha.save(tmp_path / "clear.png")
    np.testing.assert_array_equal(
        decode(open_image(tmp_path / "clear.png"), size=20, mode="pad"), np.asarray(alpha)[..., :3]
    )


def test_padding_has_the_colour_of_the_original():
    tile = decode(Image.new("RGB", (28, 4)), size=28, mode="pad")
    np.testing.assert_array_equal(tile[0, 0], PAD_COLOUR)
    np.testing.assert_array_equal(tile[13, 13], [0, 0, 0])


KINDS = [
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "P", {}),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "LA", {}),
    ("PNG", "1", {}),
    ("PNG", "I;16", {}),
    ("GIF", "P", {}),
    ("WEBP", "RGBA", {}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "CMYK", {}),
]


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 150), (150, 1), (2, 3), (37, 23)])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
def test_every_kind_and_shape_becomes_one_tile(tmp_path: Path, kind: str, mode: str, options: dict, size: tuple):
    path = tmp_path / "picture"
    path.write_bytes(_bytes(_picture(np.random.default_rng(0), *size, mode=mode), kind, **options))
    for how in ("square", "pad"):
        tile = decode(open_image(path), size=28, mode=how)
        assert tile.shape == (28, 28, 3)
        assert tile.dtype == np.uint8


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
def test_a_truncated_picture_is_refused_or_was_whole(tmp_path: Path, kind: str, mode: str, options: dict):
    data = _bytes(_picture(np.random.default_rng(0), 37, 23, mode=mode), kind, **options)
    path = tmp_path / "picture"
    reasons = set()
    for length in (0, 1, 3, 8, 20, 60, *np.linspace(80, 0.8 * len(data), 12).astype(int)):
        path.write_bytes(data[:length])
        try:
            decode(open_image(path), size=28, mode="square")
        except Refused as refusal:
            reasons.add(refusal.reason)
        else:
            # libwebp and GIF may hold all pixels before the file's end; nobody else may fill in grey.
            assert kind in ("GIF", "TIFF", "WEBP", "JPEG"), f"{kind} cut to {length} of {len(data)} bytes was decoded"
    assert "unreadable picture" in reasons
    assert reasons <= {"unreadable picture", "damaged picture"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_half_a_photo_is_damaged_not_filled_with_grey(tmp_path: Path, kind: str):
    data = _bytes(_picture(np.random.default_rng(0), 200, 200), kind)
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    with pytest.raises(Refused) as refusal:
        decode(open_image(tmp_path / "half"), size=28, mode="square")
    assert refusal.value.reason == "damaged picture"
    assert "half" in refusal.value.detail


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_never_raise_anything_but_a_refusal(tmp_path: Path, seed: int):
    rng = np.random.default_rng(seed)
    path = tmp_path / "picture"
    for kind, mode, options in KINDS:
        clean = _bytes(_picture(rng, 30, 20, mode=mode), kind, **options)
        for _ in range(15):
            data = bytearray(clean)
            for at in rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 100), rng.integers(1, 6)):
                data[at] = rng.integers(0, 256)
            path.write_bytes(data)
            try:
                decode(open_image(path), size=28, mode="pad")
            except Refused as refusal:
                assert refusal.reason in ("unreadable picture", "damaged picture", "oversized picture")  # noqa: PT017


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"<html>404</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"8BPS\0\1\0\0\0\0\0\0\0\3\0\0\0\1\0\0\0\1\0\10\0\3" + b"\0" * 20,
        b"SIMPLE  =                    T" + b" " * 2850,
        b"P6 2 2 255\n" + b"\0" * 12,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
    ],
)
def test_what_is_no_picture_of_ours_is_unreadable(tmp_path: Path, data: bytes):
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    with pytest.raises(Refused) as refusal:
        open_image(path)
    assert refusal.value.reason == "unreadable picture"
    assert "picture.jpg" in refusal.value.detail


def test_a_missing_picture_a_folder_and_a_pipe_have_their_reasons(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    reasons = {"none.png": "missing picture", "": "unreadable picture", "pipe.png": "unreadable picture"}
    for path, reason in ((tmp_path / name, reason) for name, reason in reasons.items()):
        with pytest.raises(Refused) as refusal:
            open_image(path)
        assert refusal.value.reason == reason


@pytest.mark.parametrize(
    "size", [(20_000, 20_000), (13_300, 13_300), (10_001, 10_000), (30_000, 1), (65_535, 1), (1, 4000), (2_000_000, 2)]
)
def test_a_bomb_is_refused_from_its_header(tmp_path: Path, size: tuple[int, int]):
    path = tmp_path / "bomb.png"
    path.write_bytes(_png_header(*size))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Refused) as refusal:
            open_image(path)
    assert time.perf_counter() - start < 1.0
    assert refusal.value.reason == "oversized picture", refusal.value


def test_the_most_extreme_picture_that_is_allowed_is_decoded(tmp_path: Path):
    _picture(np.random.default_rng(0), 1, MAX_ASPECT).save(tmp_path / "thin.png")
    for mode in ("square", "pad"):
        assert decode(open_image(tmp_path / "thin.png"), size=28, mode=mode).shape == (28, 28, 3)


def test_a_compressed_text_chunk_is_no_way_in(tmp_path: Path):
    data = _bytes(_picture(np.random.default_rng(0), 8, 8), "PNG")
    chunk = _chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 50_000_000))
    (tmp_path / "text.png").write_bytes(data[:33] + chunk + data[33:])
    with pytest.raises(Refused) as refusal:
        decode(open_image(tmp_path / "text.png"), size=28, mode="square")
    assert refusal.value.reason in ("unreadable picture", "damaged picture")


@pytest.mark.parametrize("profile", [b"", b"a\0"])
def test_a_colour_profile_cut_short_behind_the_pixels_is_damage(tmp_path: Path, profile: bytes):
    """Pillow raises an IndexError there, which before the pixels it takes for a sign that this is no PNG."""
    data = _bytes(_picture(np.random.default_rng(0), 8, 8), "PNG")
    end = len(data) - len(_chunk(b"IEND", b""))
    (tmp_path / "a.png").write_bytes(data[:end] + _chunk(b"iCCP", profile) + data[end:])
    for mode in ("pad", AnyRes(pinpoints=((28, 56),), merge="flat", rounding="original")):
        with pytest.raises(Refused, match=r"damaged picture: .*a\.png"):
            cut_tiles(open_image(tmp_path / "a.png"), size=28, mode=mode)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A picture folder beside files that nobody may open, with links out of it."""
    inside = tmp_path / "pictures"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "pictures_secret").mkdir()
    for path in (
        inside / "a.png",
        inside / "sub" / "b.png",
        tmp_path / "c.png",
        tmp_path / "pictures_secret" / "d.png",
    ):
        Image.new("RGB", (4, 4)).save(path)
    (inside / "link.png").symlink_to(tmp_path / "c.png")
    (inside / "linked").symlink_to(tmp_path / "pictures_secret")
    (inside / "loop.png").symlink_to(inside / "loop.png")
    (inside / "inner.png").symlink_to(inside / "sub" / "b.png")
    return inside


OUTSIDE = [
    "/etc/passwd",
    "../c.png",
    "sub/../../c.png",
    "./.././c.png",
    "..",
    "../pictures_secret/d.png",
    "link.png",
    "linked/d.png",
    "linked/../pictures_secret/d.png",
    "//etc/passwd",
    "a.png\0.jpg",
    "\0",
    "../" * 40 + "etc/passwd",
    "/proc/self/environ",
]
NOT_THERE = [
    "~/.bashrc",
    "~root",
    "https://example.com/a.png",
    "file:///etc/passwd",
    "file:a.png",
    "\\\\host\\share\\a.png",
    "..\\c.png",
    "%2e%2e/c.png",
    "loop.png",
    "a.png/b.png",
    "sub",
    ".",
    "",
    "x" * 300,
    "y/" * 3000,
    "$HOME/a.png",
]


@pytest.mark.parametrize("name", OUTSIDE + NOT_THERE, ids=lambda name: repr(name[:30]))
def test_a_hostile_name_opens_nothing_outside_the_folder(root: Path, name: str):
    opened: list[str] = []
    _watch(opened)
    try:
        with pytest.raises(Refused) as refusal:
            open_image(resolve(str(root), name))
    finally:
        _watch(None)
    assert (refusal.value.reason == "path outside the folder") == (name in OUTSIDE)
    assert all(Path(path).is_relative_to(root.resolve()) for path in opened), opened


@pytest.mark.parametrize("name", ["\ud800.png", "sub/\udfff"])
def test_a_name_that_no_file_system_takes_is_refused(root: Path, name: str):
    with pytest.raises(Refused):
        open_image(resolve(str(root), name))


@pytest.mark.parametrize("name", ["a.png", "sub/b.png", "./sub/../a.png", "inner.png", "sub//b.png"])
def test_names_that_stay_inside_are_opened(root: Path, name: str):
    assert open_image(resolve(str(root), name)).size == (4, 4)


def test_an_absolute_name_inside_and_a_relative_root_work(root: Path, monkeypatch: pytest.MonkeyPatch):
    assert open_image(resolve(str(root), str(root / "a.png"))).size == (4, 4)
    monkeypatch.chdir(root.parent)
    assert open_image(resolve("pictures", "sub/b.png")).size == (4, 4)
    assert open_image(resolve("./pictures/", "a.png")).size == (4, 4)
    with pytest.raises(Refused):
        resolve("pictures", "../c.png")


_watched: list[list[str] | None] = []


def _watch(opened: list[str] | None) -> None:
    """Collects every path that this process opens; an audit hook cannot be removed, so one serves all tests."""
    if not _watched:
        _watched.append(None)

        def hook(event: str, arguments: tuple) -> None:
            if event == "open" and _watched[0] is not None and isinstance(arguments[0], str | bytes | os.PathLike):
                _watched[0].append(os.fsdecode(arguments[0]))

        sys.addaudithook(hook)
    _watched[0] = opened


@pytest.mark.parametrize("seed", range(16))
def test_tiles_are_those_of_the_hugging_face_processor(seed: int):
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    rng = np.random.default_rng(seed)
    size = (14, 28)[seed % 2]
    pinpoints = tuple((size * w, size * h) for w, h in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
    image = _picture(rng, *map(int, rng.integers(2, 150, 2)), mode=MODES[seed % len(MODES)])
    reference = LlavaNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_grid_pinpoints=[[height, width] for width, height in pinpoints],
    )
    # Before the alpha of some modes is laid over white, as above.
    expected = reference(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
    tiles = cut_tiles(image, size=size, mode=AnyRes(pinpoints=pinpoints, merge="flat", rounding="huggingface"))
    ours = np.moveaxis(np.asarray(normalise(jnp.asarray(tiles), np.float32)), -1, 1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_one_tile_is_a_picture_of_one_tile():
    image = _picture(np.random.default_rng(0), 40, 30)
    for mode in ("square", "pad"):
        np.testing.assert_array_equal(cut_tiles(image, size=14, mode=mode)[0], decode(image, size=14, mode=mode))
        layout = find_layout(image.size, mode, image_size=14, num_features=9)
        assert (layout.patches.tolist(), layout.num_slots) == ([list(range(9))], 9)


def test_a_damaged_picture_has_no_tiles(tmp_path: Path):
    _picture(np.random.default_rng(0), 60, 40).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    mode = AnyRes(pinpoints=((28, 56),), merge="flat", rounding="original")
    with pytest.raises(Refused, match="damaged picture"):
        cut_tiles(open_image(tmp_path / "half.png"), size=28, mode=mode)


@pytest.mark.parametrize(
    ("changes", "merge", "pinpoints", "message"),
    [
        ({}, "spatial", ((16, 32), (32, 20)), r"multiples of the tower's image_size=16"),
        ({"select_feature": "cls_patch"}, "spatial", ((16, 32),), r"arranges patches alone; got select_feature=cls"),
        ({}, "spatial_unpad", ((16, 32),), r"the model's image_newline; got image_newline=False"),
    ],
)
def test_a_mode_that_the_model_cannot_take_is_refused(changes: dict, merge, pinpoints, message: str):
    model = dataclasses.replace(LLAVA, **changes)
    with pytest.raises(ValueError, match=message):
        check_mode(AnyRes(pinpoints=pinpoints, merge=merge, rounding="original"), model)


def test_modes_that_fit_are_taken():
    full = dataclasses.replace(LLAVA, select_feature="cls_patch")
    check_mode(AnyRes(pinpoints=((16, 32),), merge="flat", rounding="original"), full)
    newline = dataclasses.replace(LLAVA, image_newline=True)
    check_mode(AnyRes(pinpoints=((16, 32),), merge="spatial_unpad", rounding="huggingface"), newline)
    check_mode("pad", full)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_tiff_has_the_sides_that_its_header_promises(tmp_path: Path, orientation: int):
    pixels = np.arange(21, dtype=np.uint8).reshape(3, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.tiff", exif=exif)
    image = open_image(tmp_path / "a.tiff")
    promised = image.size
    rgb = image.convert("RGB")
    assert rgb.size == promised
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO((tmp_path / "a.tiff").read_bytes())))
    np.testing.assert_array_equal(np.asarray(rgb)[..., 0], np.asarray(turned))
