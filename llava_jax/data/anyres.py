"""Any resolution: the grid of tiles that a picture is cut into, and the slots that its patches take."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

Merge = Literal["flat", "spatial", "spatial_unpad"]
Rounding = Literal["original", "huggingface"]


class Layout(NamedTuple):
    """The slots of one picture, counted from its own first one.

    `patches`: where every patch of every tile lands, -1 if it is cut away; `newlines`: slots that hold no patch
    but the model's `image_newline`.
    """

    patches: Int[np.ndarray, "i p"]
    newlines: Int[np.ndarray, " n"]

    @property
    def num_slots(self) -> int:
        return int((self.patches >= 0).sum()) + len(self.newlines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyRes:
    """A picture as its whole, squeezed into one tile, and as a grid of tiles at a resolution that suits it.

    `pinpoints`: the resolutions to choose from, (width, height), in the order in which ties are broken; `merge`
    and `rounding`: see `arrange` and `unpad`. Source: `process_anyres_image` of the original's `mm_utils.py`.
    """

    pinpoints: tuple[tuple[int, int], ...]
    merge: Merge
    rounding: Rounding

    def __post_init__(self) -> None:
        if not self.pinpoints or not all(width > 0 and height > 0 for width, height in self.pinpoints):
            raise ValueError(f"AnyRes.pinpoints must hold pairs (width, height), all positive; got {self.pinpoints}.")

    @property
    def has_newlines(self) -> bool:
        return self.merge == "spatial_unpad"

    def resolution(self, size: tuple[int, int]) -> tuple[int, int]:
        """The pinpoint that keeps most of a picture's pixels and, of equals, wastes the least; the first of those.

        Sizes are (width, height) (`select_best_resolution` of the original and of transformers).
        """
        width, height = size

        def quality(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[0] / width, pinpoint[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - pinpoint[0] * pinpoint[1]

        return max(self.pinpoints, key=quality)

    def grid(self, size: tuple[int, int], image_size: int) -> tuple[int, int]:
        """Columns and rows of the tiles that a picture of this (width, height) is cut into."""
        width, height = self.resolution(size)
        return width // image_size, height // image_size

    def layout(self, size: tuple[int, int], image_size: int, num_features: int) -> Layout:
        """Where the patches of a picture of this (width, height) land; a tile has `num_features` of them."""
        grid = self.grid(size, image_size)
        return arrange(grid, num_features, size=size, merge=self.merge, rounding=self.rounding)


def one_tile(num_features: int, *, newline: bool = False) -> Layout:
    """The layout of a picture that is a single tile; `newline` ends it with one."""
    return Layout(np.arange(num_features)[None], np.arange(num_features, num_features + newline))


def arrange(
    grid: tuple[int, int], num_features: int, *, size: tuple[int, int], merge: Merge, rounding: Rounding
) -> Layout:
    """The layout of a whole-picture tile followed by a grid of (columns, rows) tiles.

    `flat` keeps tiles one after the other. `spatial` puts the tiles' patches into the order in which they lie in
    the picture. `spatial_unpad` also cuts the patches that only saw padding, and ends every row with a newline.
    The whole-picture tile comes first in each (`prepare_inputs_labels_for_multimodal` of the original).

    Example, 2 x 1 tiles of 2 x 2 patches, a picture of 3 x 2 pixels:
        flat           tile 1 -> [[4, 5], [6, 7]]     tile 2 -> [[8, 9], [10, 11]]
        spatial        tile 1 -> [[4, 5], [8, 9]]     tile 2 -> [[6, 7], [10, 11]]
        spatial_unpad  as spatial, with slots 8 and 13 as newlines and the second row one slot later
    """
    columns, rows = grid
    num_tiles = 1 + columns * rows
    patches = np.arange(num_tiles * num_features)
    if merge == "flat":
        return Layout(patches.reshape(num_tiles, num_features), np.arange(0))
    side = math.isqrt(num_features)
    whole, of_tiles = np.split(patches, [num_features])
    # The patch that lies at each place of the picture.
    places = of_tiles.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
    if merge == "spatial_unpad":
        places = places[unpad(size, (columns * side, rows * side), rounding)]
    height, width = places.shape
    line = width + (merge == "spatial_unpad")
    slots = num_features + np.arange(height * line).reshape(height, line)
    landing = np.full(len(patches), -1)
    landing[whole] = whole
    landing[places] = slots[:, :width]
    return Layout(landing.reshape(num_tiles, num_features), slots[:, width:].ravel())


def unpad(size: tuple[int, int], grid: tuple[int, int], rounding: Rounding) -> tuple[slice, slice]:
    """Rows and columns of a (columns, rows) grid of patches that saw something of a picture of (width, height).

    The two roundings differ by one row or column where the product is an integer up to float error: the original
    cuts it to an integer as it is, transformers after rounding to 7 digits (`unpad_image` of either).
    """
    (width, height), (columns, rows) = size, grid

    def kept(length: float) -> int:
        return int(length if rounding == "original" else round(length, 7))

    if width / height > columns / rows:
        cut = (rows - kept(height * (columns / width))) // 2
        return slice(cut, rows - cut), slice(0, columns)
    cut = (columns - kept(width * (rows / height))) // 2
    return slice(0, rows), slice(cut, columns - cut)


def find_slots(
    is_image: Bool[np.ndarray, " t"], layouts: Sequence[Layout]
) -> tuple[Int[np.ndarray, "i p"], Bool[np.ndarray, " t"]]:
    """For one sequence: the slot of every patch of every tile, -1 if it has none, and which slots are newlines.

    `is_image` marks the pictures' slots, in order; a sequence that was cut may lack the last of them.

    Example, a picture of two patches with a newline behind them:
        is_image = [F, T, T, T, F]   ->   patch slots [[1, 2]], newlines [F, F, F, T, F]
    """
    total = sum(layout.num_slots for layout in layouts)
    slots = np.flatnonzero(is_image)
    slots = np.append(slots, np.full(total - len(slots) + 1, -1))
    is_newline = np.zeros(len(is_image) + 1, bool)
    found: list[np.ndarray] = []
    first = 0
    for layout in layouts:
        found.append(np.where(layout.patches < 0, -1, slots[first + layout.patches]))
        is_newline[slots[first + layout.newlines]] = True
        first += layout.num_slots
    patches = np.concatenate(found) if found else np.zeros((0, 0), int)
    return patches, is_newline[:-1]
