"""Pictures: opened under limits, brought to the tower's square, kept as bytes."""

import os
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from llava_jax.errors import Refused

ImageMode = Literal["square", "pad"]

# Decoders with a record of memory bugs (PSD, EPS, FITS, ...) are never reached.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
MAX_SIDE = 10_000
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200
# int(255 * mean), the colour that the original pads with (`expand2square`).
PAD_COLOUR = (122, 116, 104)


def open_image(path: str | Path) -> Image.Image:
    """The picture of a file, header read and limits checked, nothing decoded yet.

    Raises:
      Refused: the file is missing, no picture of a known format, or larger than the limits.
    """
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise Refused("missing picture", f"{path} does not exist") from None
    except Image.DecompressionBombError as error:
        raise Refused("oversized picture", f"{path}: {error}") from None
    except (OSError, ValueError) as error:
        raise Refused("unreadable picture", f"{path}: {error}") from None
    width, height = image.size
    shape_limit = max(width, height) > MAX_ASPECT * min(width, height)
    if width > MAX_SIDE or height > MAX_SIDE or width * height > MAX_PIXELS or shape_limit:
        raise Refused(
            "oversized picture",
            f"{path} is {width}x{height}; at most {MAX_SIDE} a side, {MAX_PIXELS} pixels, aspect {MAX_ASPECT}",
        )
    return image


def resolve(root: str, name: str) -> Path:
    """The path of a picture named by a record; refuses names that leave the picture folder."""
    try:
        path = os.path.realpath(os.path.join(root, name))
    except ValueError:
        # A NUL, or a lone surrogate: no file system has such a name.
        path = None
    if path is None or os.path.commonpath([path, os.path.realpath(root)]) != os.path.realpath(root):
        raise Refused("path outside the folder", f"{name!r} does not stay inside {root!r}")
    return Path(path)


def decode(image: Image.Image, *, size: int, mode: ImageMode) -> UInt8[np.ndarray, "size size 3"]:
    """RGB bytes of one `size` x `size` tile.

    `square` scales the shorter side to `size` and crops the centre (`CLIPImageProcessor` of transformers);
    `pad` first widens the picture to a square (`expand2square` of the original), so that nothing is lost.
    EXIF orientation is not applied and alpha is dropped, as in the original.

    Raises:
      Refused: the pixels are damaged.
    """
    try:
        rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise Refused("damaged picture", f"{getattr(image, 'filename', 'picture')}: {error}") from None
    if mode == "pad":
        rgb = _pad_to_square(rgb)
    width, height = rgb.size
    short = min(width, height)
    scaled = (size * width // short, size * height // short)
    if rgb.size != scaled:
        rgb = rgb.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return np.asarray(rgb)[top : top + size, left : left + size]


def _pad_to_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
