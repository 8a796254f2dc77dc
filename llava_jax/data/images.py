"""Pictures: opened under limits, brought to tiles of the tower's size, kept as bytes."""

import functools
import io
import math
import os
import stat
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from llava_jax.data.anyres import AnyRes, Layout, one_tile
from llava_jax.data.resample import pad_and_resize, resize
from llava_jax.errors import Refused
from llava_jax.shapes import LlavaConfig

OneTile = Literal["square", "pad"]
ImageMode = OneTile | AnyRes

# Decoders with a record of memory bugs (PSD, EPS, FITS, ...) are never reached.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
MAX_SIDE = 10_000
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200
# int(255 * mean), the colour that the original pads with (`expand2square`).
PAD_COLOUR = (122, 116, 104)
# Blocks of memory that Pillow keeps for its next picture (`PILLOW_BLOCKS_MAX`): by default none, and every picture
# would wait for new pages.
Image.core.set_blocks_max(4)
# The same of a picture's other memory: once a block of this size was freed, glibc keeps smaller ones that are freed, up
# to twice as much (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
np.empty(16 << 20, np.uint8)


def open_image(source: str | Path | bytes) -> Image.Image:
    """The picture of a file or of a file's bytes, header read and limits checked, nothing decoded yet.

    Raises:
      Refused: the file is missing, no picture of a known format, or larger than the limits.
    """
    path = "the picture in the record" if isinstance(source, bytes) else source
    if not isinstance(source, bytes) and os.path.exists(source) and not os.path.isfile(source):
        # A pipe would be waited for without end.
        raise Refused("unreadable picture", f"{path} is no file")
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except FileNotFoundError:
        raise Refused("missing picture", f"{path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise Refused("oversized picture", f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise Refused("unreadable picture", f"{path}: {error}") from None
    if image.format == "TIFF":
        # Pillow 13 maps a plain TIFF of that name with its sides swapped if EXIF turns it; without one it reads it.
        image.filename = ""
    width, height = image.size
    shape_limit = max(width, height) > MAX_ASPECT * min(width, height)
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS or shape_limit:
        raise Refused(
            "oversized picture",
            f"{path} is {width}x{height}; at most {MAX_SIDE} a side, {MAX_PIXELS} pixels, aspect {MAX_ASPECT}",
        )
    return image


def find_picture(root: str, image: str | bytes) -> Path | bytes:
    """Where a record's picture is; refuses names that leave the picture folder."""
    return image if isinstance(image, bytes) else resolve(root, image)


def resolve(root: str, name: str) -> Path:
    """The path of a picture named by a record; refuses names that leave the picture folder."""
    try:
        real = _real_folder(root if os.path.isabs(root) else os.path.join(os.getcwd(), root))
        folder, base = os.path.split(os.path.join(real, name))
        path = os.path.join(_real_folder(folder), base)
        if base in ("", ".", "..") or _is_link(path):
            path = os.path.realpath(path)
    except ValueError:
        # A NUL, or a lone surrogate: no file system has such a name.
        path, real = "", root
    if not os.path.join(path, "").startswith(os.path.join(real, "")):
        raise Refused("path outside the folder", f"{name!r} does not stay inside {root!r}")
    return Path(path)


@functools.lru_cache(maxsize=1024)
def _real_folder(path: str) -> str:
    """A folder's real path, looked up once: each part of it costs a call to the kernel, and pictures share folders.

    What links lead where is taken not to change while a process runs.
    """
    return os.path.realpath(path)


def _is_link(path: str) -> bool:
    """As `os.path.islink`, which however takes names that no file system has."""
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:
        return False


def check_mode(mode: ImageMode, model: LlavaConfig) -> None:
    """Raises `ValueError` if a model cannot look at pictures in this way."""
    if not isinstance(mode, AnyRes):
        return
    size = model.vision.image_size
    if any(width % size or height % size for width, height in mode.pinpoints):
        raise ValueError(
            f"AnyRes.pinpoints must be multiples of the tower's image_size={size}; got {mode.pinpoints}. "
            "Take both from one checkpoint."
        )
    if mode.merge != "flat" and model.select_feature != "patch":
        raise ValueError(
            f"AnyRes.merge={mode.merge} arranges patches alone; got select_feature={model.select_feature}. "
            "Use patch, or merge flat."
        )
    if mode.has_newlines and not model.image_newline:
        raise ValueError(
            f"AnyRes.merge={mode.merge} ends rows with the model's image_newline; got image_newline=False. "
            "Set it in the model, or merge spatial."
        )


def find_layout(size: tuple[int, int], mode: ImageMode, *, image_size: int, num_features: int) -> Layout:
    """The slots that a picture of this (width, height) takes, known before a pixel is read."""
    return mode.layout(size, image_size, num_features) if isinstance(mode, AnyRes) else one_tile(num_features)


def cut_tiles(image: Image.Image, *, size: int, mode: ImageMode) -> UInt8[np.ndarray, "i size size 3"]:
    """RGB bytes of a picture's tiles: one, or the whole picture squeezed into one and then a grid, row by row.

    The grid is cut from the picture enlarged or shrunk to fit the chosen resolution, centred on black
    (`process_anyres_image` and `resize_and_pad_image` of the original; transformers agrees).

    Raises:
      Refused: the pixels are damaged.
    """
    if not isinstance(mode, AnyRes):
        return decode(image, size=size, mode=mode)[None]
    rgb = _to_rgb(image)
    width, height = mode.resolution(rgb.size)
    by_width, by_height = width / rgb.width, height / rgb.height
    if by_width < by_height:
        fitted = width, min(math.ceil(rgb.height * by_width), height)
    else:
        fitted = min(math.ceil(rgb.width * by_height), width), height
    canvas = np.zeros((height, width, 3), np.uint8)
    left, top = (width - fitted[0]) // 2, (height - fitted[1]) // 2
    canvas[top : top + fitted[1], left : left + fitted[0]] = resize(rgb, fitted)
    grid = canvas.reshape(height // size, size, width // size, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return np.concatenate([resize(rgb, (size, size))[None], grid])


def decode(image: Image.Image, *, size: int, mode: OneTile) -> UInt8[np.ndarray, "size size 3"]:
    """RGB bytes of one `size` x `size` tile.

    `square` scales the shorter side to `size` and crops the centre (`CLIPImageProcessor` of transformers);
    `pad` first widens the picture to a square (`expand2square` of the original), so that nothing is lost.
    EXIF orientation is not applied and alpha is dropped, as in the original.

    Raises:
      Refused: the pixels are damaged.
    """
    rgb = _to_rgb(image)
    if rgb.size == (size, size):
        return np.asarray(rgb)
    if mode == "pad":
        return pad_and_resize(rgb, size, PAD_COLOUR)
    short = min(rgb.size)
    width, height = (size * side // short for side in rgb.size)
    left, top = (width - size) // 2, (height - size) // 2
    return resize(rgb, (width, height), (left, top, left + size, top + size))


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
        # To convert what is RGB already would copy it.
        return image if image.mode == "RGB" else image.convert("RGB")
    # Pillow raises whatever its code meets in damaged bytes, such as IndexError for a colour profile that is too short.
    except Exception as error:
        raise Refused("damaged picture", f"{getattr(image, 'filename', '') or 'picture'}: {error}") from None
