"""Merging: embeddings, labels, masks and positions that the original makes of text and recorded features."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.data.anyres import AnyRes, Layout, arrange, one_tile
from llava_jax.data.conversation import IMAGE_MARK, IMAGE_TOKEN, V1, Span, Tokenized, tokenize
from llava_jax.data.rows import Conversations, Needs, make_example
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import Refused
from llava_jax.models.llava import Llava
from tests.conformance.report import Case, expect_fields, not_built, reads

COMPANIONS = ("merge/merge_llava.npz", "merge/merge_next.npz")
FIELDS = (
    "id",
    "source",
    "name",
    "config",
    "vision",
    "image_container",
    "tiles_per_image",
    "image_sizes_wh",
    "modalities",
    "restored_commented_out_code",
    "given",
    "num_image_tokens",
    "returned_none",
    "error",
    "out_shape",
    "attention_mask_dtype",
)
CONFIG_FIELDS = (
    "mm_patch_merge_type",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "tokenizer_padding_side",
    "tokenizer_model_max_length",
)
IGNORED = -100


@reads("merge/merge_llava.json", "merge/merge_next.json")
def test_merge(case: Case, under_original: Callable[[str], None]):
    record = case.record
    expect_fields(record, *FIELDS)
    assert record["error"] is None, "no error of the original is known here"
    _later(record)
    expect_fields(record["config"], *CONFIG_FIELDS)
    with np.load(f"{case.root / case.family}.npz") as arrays:
        prefix = f"{record['id']}/"
        recorded = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
    given, wanted = ({n[len(p) :]: v for n, v in recorded.items() if n.startswith(p)} for p in ("in/", "out/"))
    texts = _texts(given)
    if "input_ids" in wanted:
        # A decoding step, or no pictures at all: nothing is merged, and ids go to the decoder as they are.
        assert not (given["input_ids"] == IMAGE_TOKEN).any()
        assert set(wanted) <= set(given)
        for name, value in wanted.items():
            np.testing.assert_array_equal(value, given[name], err_msg=name)
        return

    layouts = _layouts(record)
    tiles = np.split(given["features"], np.cumsum([len(layout.patches) for layout in layouts])[:-1])
    shares, surplus = _shares(texts, len(layouts))
    if surplus:
        marks, unused = Span(IMAGE_MARK * (len(layouts) - surplus)), Tokenizer.__new__(Tokenizer)
        with pytest.raises(Refused, match="image count"):
            tokenize([marks], unused, [1] * len(layouts))
        under_original("a picture without a mark is ignored")
    limit = record["config"].get("tokenizer_model_max_length")
    merged = []
    for text, share in zip(texts, shares, strict=True):
        text = _widened(text, [layouts[i] for i in share])
        length = limit or len(text.tokens)
        try:
            text = _rows(length, None).fit(text)
        except Refused:
            under_original("cuts through a picture")
            text = _rows(length, "original").fit(text)
        merged.append(_merge(text, [tiles[i] for i in share], [layouts[i] for i in share], given, record))
    _check(merged, wanted, record)


def _later(record: Mapping[str, Any]) -> None:
    """Ends the case if it needs what is not built."""
    config = record["config"]
    for word in ("maxpool2x2", "nobase"):
        if word in config.get("mm_patch_merge_type", ""):
            not_built(f"merge {word}")
    if "anyres_max" in config.get("image_aspect_ratio", ""):
        not_built("image mode anyres_max_N")
    if "video" in (record["modalities"] or ()):
        not_built("faster video" if config.get("add_faster_video") else "video and newline positions")


def _texts(given: Mapping[str, np.ndarray]) -> list[Tokenized]:
    """The rows without their padding."""
    ids = given["input_ids"]
    mask = given.get("attention_mask", np.ones(ids.shape)).astype(bool)
    labels = given.get("labels", np.full(ids.shape, IGNORED))
    assert ((labels == ids) | (labels == IGNORED)).all()
    return [Tokenized(ids[b][mask[b]], (labels != IGNORED)[b][mask[b]]) for b in range(len(ids))]


def _layouts(record: Mapping[str, Any]) -> list[Layout]:
    """Slots of every picture, by the record's merge type; tensors of one tile a picture are never merged."""
    config, vision = record["config"], record["vision"]
    num_features = vision["num_patches_per_side"] ** 2
    is_list = record["image_container"] in ("list3d", "list4d", "stack5d")
    merge = config.get("mm_patch_merge_type", "flat") if is_list else "flat"
    mode = config.get("image_aspect_ratio", "square")
    layouts = []
    for num_tiles, (width, height) in zip(record["tiles_per_image"], record["image_sizes_wh"], strict=True):
        if num_tiles == 1:
            layout = one_tile(num_features, newline=merge == "spatial_unpad")
        elif mode == "anyres":
            pinpoints = tuple((width, height) for width, height in config["image_grid_pinpoints"])
            anyres = AnyRes(pinpoints=pinpoints, merge=merge, rounding="original")
            layout = anyres.layout((width, height), vision["image_size"], num_features)
        elif merge == "flat":
            layout = arrange((num_tiles - 1, 1), num_features, size=(width, height), merge=merge, rounding="original")
        else:
            raise AssertionError(f"several tiles in image mode {mode!r}")
        assert len(layout.patches) == num_tiles
        layouts.append(layout)
    return layouts


def _shares(texts: Sequence[Tokenized], num_images: int) -> tuple[list[list[int]], int]:
    """The pictures of each row, and how many are left over; a row without a mark consumes one and shows none."""
    shares, at = [], 0
    for text in texts:
        marks = int((text.tokens == IMAGE_TOKEN).sum())
        shares.append(list(range(at, at + marks)))
        at += max(marks, 1)
    assert at <= num_images, "more marks than pictures"
    return shares, num_images - at


def _widened(text: Tokenized, layouts: Sequence[Layout]) -> Tokenized:
    """Each mark repeated to the slots of its picture."""
    widths = np.ones(len(text.tokens), int)
    widths[text.tokens == IMAGE_TOKEN] = [layout.num_slots for layout in layouts]
    return Tokenized(np.repeat(text.tokens, widths), np.repeat(text.is_answer, widths))


def _rows(length: int, compat: str | None, **changes: Any) -> Conversations:
    return Conversations(template=V1, length=length, overflow="text", compat=compat, **{"tiles": 64} | changes)


def _merge(
    text: Tokenized,
    tiles: Sequence[np.ndarray],
    layouts: Sequence[Layout],
    given: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """One row through our host and device code, with the tower replaced by the recorded features."""
    size, num_features = 1, given["features"].shape[1]
    blank = [np.zeros((len(tile), size, size, 3), np.uint8) for tile in tiles]
    example = make_example(text, blank, layouts, size)
    # Two slots and two tiles more than needed: what is not used must not be seen.
    num_tiles = len(example.images) + 2
    newlines = AnyRes(pinpoints=((1, 1),), merge="spatial_unpad", rounding="original")
    rows = _rows(len(text.tokens) + 2, None, tiles=num_tiles, image_mode=newlines)
    row = rows.assemble([example], Needs(None, "", size, num_features))
    features = np.zeros((num_tiles, *given["features"].shape[1:]), np.float32)
    features[: len(example.images)] = np.concatenate([features[:0], *tiles])
    model = types.SimpleNamespace(
        tower=types.SimpleNamespace(features=lambda images, **_: jnp.asarray(features)),
        projector=lambda features: features,
        decoder=types.SimpleNamespace(embed_tokens=lambda tokens: jnp.asarray(given["embed_tokens"])[tokens]),
        image_newline=jnp.asarray(given["image_newline"]),
        config=types.SimpleNamespace(tower_depth=1, select_feature="patch"),
    )
    arrays = (jnp.asarray(row[name])[None] for name in ("tokens", "images", "patch_slots", "is_newline"))
    end = len(text.tokens)
    labels = np.where(row["is_target"], row["targets"], IGNORED)[: end - 1]
    return {
        "inputs_embeds": np.asarray(Llava.embed(model, *arrays))[0, :end],
        # Targets are one ahead; the first label is no target of anything.
        "labels": np.append(np.where(text.is_answer, text.tokens, IGNORED)[:1], labels),
        "attention_mask": (row["segment_ids"] > 0)[:end],
        "position_ids": row["positions"][:end],
    }


def _check(merged: Sequence[Mapping[str, np.ndarray]], wanted: Mapping[str, np.ndarray], record: Mapping[str, Any]):
    """Compares rows padded to one length on the recorded side with the recorded batch."""
    length = max(len(row["labels"]) for row in merged)
    is_left = record["config"].get("tokenizer_padding_side", "right") == "left"
    assert wanted["inputs_embeds"].shape[:2] == (len(merged), length)
    for name, value in wanted.items():
        padding = IGNORED if name == "labels" else 0
        for expected, row in zip(value, merged, strict=True):
            found = np.full((length, *expected.shape[1:]), padding, expected.dtype)
            found[length - len(row[name]) if is_left else 0 :][: len(row[name])] = row[name]
            np.testing.assert_array_equal(found, expected, err_msg=name)
