"""Any resolution: the choice of a grid, and the slots of patches and newlines, against transformers and by hand."""

import types

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from llava_jax.data.anyres import AnyRes, Layout, arrange, find_slots, one_tile, unpad

# What LLaVA-1.6 was trained with, width first.
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
NEXT = AnyRes(pinpoints=PINPOINTS, merge="spatial_unpad", rounding="huggingface")
SMALL = AnyRes(pinpoints=tuple((w // 21, h // 21) for w, h in PINPOINTS), merge="spatial_unpad", rounding="original")


def _sizes(count: int, *, seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    drawn = [tuple(map(int, np.exp(rng.uniform(0, np.log(2000), 2)))) for _ in range(count)]
    return [
        *drawn,
        (1, 1),
        (336, 336),
        (672, 672),
        (1, 2000),
        (2000, 1),
        (1008, 336),
        (500, 501),
        (2, 3),
        (824, 103),
        (856, 321),
    ]


def _read(layout: Layout) -> list[int]:
    """The numbers of the patches in slot order, tile after tile; -1 for a newline."""
    line = np.full(layout.num_slots, -2)
    flat = layout.patches.ravel()
    line[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
    line[layout.newlines] = -1
    return line.tolist()


def test_the_layouts_of_the_docstring():
    flat, spatial, unpadded = (
        arrange((2, 1), 4, size=(3, 2), merge=merge, rounding="original")
        for merge in ("flat", "spatial", "spatial_unpad")
    )
    assert flat.patches.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert spatial.patches.tolist() == [[0, 1, 2, 3], [4, 5, 8, 9], [6, 7, 10, 11]]
    assert unpadded.patches.tolist() == [[0, 1, 2, 3], [4, 5, 9, 10], [6, 7, 11, 12]]
    assert [layout.newlines.tolist() for layout in (flat, spatial, unpadded)] == [[], [], [8, 13]]
    assert [layout.num_slots for layout in (flat, spatial, unpadded)] == [12, 12, 14]


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), (1, 1)])
def test_padding_leaves_no_slot_and_nothing_shares_one(grid: tuple[int, int]):
    for size in _sizes(8, seed=sum(grid)):
        for merge in ("flat", "spatial", "spatial_unpad"):
            for rounding in ("original", "huggingface"):
                layout = arrange(grid, 16, size=size, merge=merge, rounding=rounding)
                landed = layout.patches[layout.patches >= 0]
                taken = np.concatenate([landed, layout.newlines])
                assert sorted(taken.tolist()) == list(range(layout.num_slots))
                assert layout.patches.shape == (1 + grid[0] * grid[1], 16)
                np.testing.assert_array_equal(layout.patches[0], np.arange(16))
                if merge == "spatial_unpad":
                    rows, columns = unpad(size, (grid[0] * 4, grid[1] * 4), rounding)
                    assert len(layout.newlines) == len(range(*rows.indices(grid[1] * 4)))
                    assert len(landed) == 16 + len(layout.newlines) * len(range(*columns.indices(grid[0] * 4)))
                else:
                    assert layout.num_slots == layout.patches.size


def test_the_resolution_is_the_references():
    turned = [(height, width) for width, height in PINPOINTS]
    for width, height in _sizes(100, seed=1):
        assert NEXT.resolution((width, height)) == select_best_resolution((height, width), turned)[::-1]


def test_the_order_of_pinpoints_breaks_ties():
    """A square fits a tall and a wide grid equally: the original and Hugging Face list them in opposite orders."""
    assert NEXT.resolution((336, 336)) == (336, 672)
    wide_first = AnyRes(pinpoints=(PINPOINTS[1], PINPOINTS[0], *PINPOINTS[2:]), merge="flat", rounding="original")
    assert wide_first.resolution((336, 336)) == (672, 336)


@pytest.mark.parametrize("tile", [16, 336])
def test_patches_and_newlines_lie_where_the_reference_packs_them(tile: int):
    """`pack_image_features` on features that are their own numbers."""
    mode = AnyRes(
        pinpoints=tuple((w * tile // 336, h * tile // 336) for w, h in PINPOINTS),
        merge="spatial_unpad",
        rounding="huggingface",
    )
    vision = types.SimpleNamespace(image_size=tile, patch_size=tile // 4)
    turned = [[height, width] for width, height in mode.pinpoints]
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=turned))
    for width, height in _sizes(40, seed=2):
        layout = mode.layout((width, height), tile, 16)
        features = torch.arange(layout.patches.size).reshape(-1, 16, 1)
        packed, lengths = LlavaNextModel.pack_image_features(
            model, [features], torch.tensor([[height, width]]), "default", torch.tensor([-1])
        )
        assert int(lengths[0]) == layout.num_slots
        assert packed[0][:, 0].tolist() == _read(layout), (width, height)


def test_the_number_of_slots_is_what_the_references_processor_counts():
    processor = types.SimpleNamespace(
        image_processor=types.SimpleNamespace(image_grid_pinpoints=[[h, w] for w, h in PINPOINTS]),
        patch_size=14,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *sizes: LlavaNextProcessor._get_unpadded_features(None, *sizes),
    )
    for width, height in _sizes(100, seed=3):
        count = LlavaNextProcessor._get_number_of_features(processor, height, width, 336, 336)
        assert NEXT.layout((width, height), 336, 576).num_slots == count, (width, height)


@pytest.mark.parametrize(
    ("size", "slots"),
    [((1024, 899), 2634), ((640, 480), 2340), ((336, 336), 1176), ((384, 384), 2928), ((500, 333), 1464),
     ((1000, 300), 2182), ((300, 1000), 2232), ((800, 1200), 2160), ((1920, 1080), 1948)],
)  # fmt: skip
def test_known_pictures_take_known_slots(size: tuple[int, int], slots: int):
    assert NEXT.layout(size, 336, 576).num_slots == slots


@pytest.mark.parametrize(
    ("size", "grid"), [((47, 752), (48, 48)), ((176, 55), (48, 48)), ((110, 352), (48, 48)), ((824, 103), (8, 4))]
)
def test_the_two_roundings_differ_where_a_product_falls_just_short(size: tuple[int, int], grid: tuple[int, int]):
    """55 * (48 / 176) is 15, and in floating point a little less: the original cuts one more on both sides."""
    original, theirs = (
        np.zeros(grid[::-1])[unpad(size, grid, rounding)].size for rounding in ("original", "huggingface")
    )
    assert theirs - original == 2 * (grid[0] if size[0] > size[1] else grid[1])


def test_slots_of_the_docstring():
    layout = one_tile(2, newline=True)
    patches, is_newline = find_slots(np.array([0, 1, 1, 1, 0], bool), [layout])
    assert patches.tolist() == [[1, 2]]
    assert is_newline.tolist() == [False, False, False, True, False]


def test_slots_of_several_pictures_and_of_a_cut_sequence():
    layouts = [SMALL.layout((20, 40), 16, 4), one_tile(4), SMALL.layout((40, 20), 16, 4)]
    total = sum(layout.num_slots for layout in layouts)
    is_image = np.zeros(total + 6, bool)
    first, second, third = (layout.num_slots for layout in layouts)
    is_image[1 : 1 + first] = is_image[3 + first : 3 + first + second] = is_image[-third - 1 : -1] = True
    patches, is_newline = find_slots(is_image, layouts)
    assert len(patches) == 3 + 1 + 3
    assert is_newline.sum() == sum(len(layout.newlines) for layout in layouts)
    landed = patches[patches >= 0]
    np.testing.assert_array_equal(np.sort(np.append(landed, np.flatnonzero(is_newline))), np.flatnonzero(is_image))
    np.testing.assert_array_equal(patches[3], 3 + first + np.arange(4))
    for length in range(len(is_image)):
        short, newline = find_slots(is_image[:length], layouts)
        np.testing.assert_array_equal(short, np.where(patches < length, patches, -1))
        np.testing.assert_array_equal(newline, is_newline[:length])


def test_no_picture_has_no_slots():
    patches, is_newline = find_slots(np.zeros(3, bool), [])
    assert patches.shape == (0, 0)
    assert not is_newline.any()


@pytest.mark.parametrize("pinpoints", [(), ((336, 0),), ((-336, 336),)])
def test_impossible_pinpoints_are_refused(pinpoints: tuple[tuple[int, int], ...]):
    with pytest.raises(ValueError, match=r"AnyRes\.pinpoints must hold pairs \(width, height\)"):
        AnyRes(pinpoints=pinpoints, merge="flat", rounding="original")
