"""Merging: embeddings, labels, masks and positions that the original makes of text and recorded features."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert.fields import Fields
from llava_jax.convert.preprocessing import image_mode_of_original
from llava_jax.data import compat
from llava_jax.data.anyres import AnyRes, Layout, arrange, one_tile
from llava_jax.data.compat import Compat
from llava_jax.data.conversation import IMAGE_MARK, IMAGE_TOKEN, Tokenized, marked, tokenize
from llava_jax.data.rows import Conversations, Needs, make_example
from llava_jax.data.templates import V1
from llava_jax.data.tokenizer import FastTokenizer
from llava_jax.errors import Refused, UserError
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
    # The original refuses the two together ("image start / end is not implemented here"); no number depends on them.
    "tune_mm_mlp_adapter",
    "mm_use_im_start_end",
    # Of videos alone.
    "mm_newline_position",
    "mm_spatial_pool_mode",
    "mm_spatial_pool_stride",
    "add_faster_video",
    "faster_token_stride",
)
COMPATS: dict[str, Compat] = {"llava": "original", "llava_next": "next"}
IGNORED = -100


class Impossible(Exception):
    """A picture in tiles that none of our image modes makes."""


@reads("merge/merge_llava.json", "merge/merge_next.json")
def test_merge(case: Case, under_original: Callable[[str], None]):
    record = case.record
    expect_fields(record, *FIELDS)
    _later(record)
    expect_fields(record["config"], *CONFIG_FIELDS)
    expect_fields(record["vision"], "image_size", "num_patches_per_side")
    expect_fields(record["given"], "labels", "attention_mask", "position_ids")
    with np.load(f"{case.root / case.family}.npz") as arrays:
        prefix = f"{record['id']}/"
        recorded = {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}
    given, wanted = ({n[len(p) :]: v for n, v in recorded.items() if n.startswith(p)} for p in ("in/", "out/"))
    if record["error"] == "NotImplementedError" and record["config"].get("tune_mm_mlp_adapter"):
        # What the original has not implemented, we have.
        _merge_rows(record, given)
    elif record["error"] is not None:
        with pytest.raises((Refused, UserError, Impossible)):
            _merge_rows(record, given)
    elif "input_ids" in wanted:
        _check_untouched(given, wanted, under_original)
    else:
        for reason in _differences(record, given):
            under_original(reason)
        _check(_merge_rows(record, given), wanted, record)


def _check_untouched(
    given: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], under_original: Callable[[str], None]
) -> None:
    """A decoding step, or no pictures at all: nothing is merged, and ids go to the decoder as they are."""
    for text in _texts(given):
        if marks := _num_marks(text):
            _expect_refusal(marks, 0)
            under_original("a mark without its picture")
    assert set(wanted) <= set(given)
    for name, value in wanted.items():
        np.testing.assert_array_equal(value, given[name], err_msg=name)


def _differences(record: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> list[str]:
    """Why the default would not give the recorded rows; empty if it does."""
    texts, num_images = _texts(given), len(record["tiles_per_image"])
    needed = sum(max(_num_marks(text), 1) for text in texts)
    reasons = []
    if needed != num_images:
        _expect_refusal(needed, num_images)
        reasons.append("a picture without a mark is ignored" if needed < num_images else "a mark without its picture")
    if record["modalities"] is not None and len(record["modalities"]) < len(texts):
        reasons.append("rows that no modality is named for are dropped")
    layouts = _layouts(record)
    for text, share in zip(texts, compat.share(_marks(texts), num_images, COMPATS[record["source"]]), strict=True):
        text = _widened(text, [layouts[i] for i in share])
        limit = record["config"].get("tokenizer_model_max_length")
        try:
            _rows(limit or len(text.tokens) + 2, None).fit(text)
        except Refused:
            reasons.append("a picture cut through")
    return reasons


def _expect_refusal(marks: int, num_images: int) -> None:
    """By default a conversation is refused whose marks are not as many as its pictures."""
    unused = FastTokenizer.__new__(FastTokenizer)
    with pytest.raises(Refused, match="image count"):
        tokenize(marked(IMAGE_MARK * marks), unused, [1] * num_images)


def _merge_rows(record: Mapping[str, Any], given: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Every row of the recorded batch, merged."""
    layouts, texts = _layouts(record), _texts(given)
    tiles = np.split(given["features"], np.cumsum([len(layout.patches) for layout in layouts])[:-1])
    shares = compat.share(_marks(texts), len(layouts), COMPATS[record["source"]])
    # LLaVA-NeXT goes on with as many rows as it was told modalities.
    num_rows = len(texts) if record["modalities"] is None else len(record["modalities"])
    merged = []
    for text, share in list(zip(texts, shares, strict=True))[:num_rows]:
        text = _widened(text, [layouts[i] for i in share])
        limit = record["config"].get("tokenizer_model_max_length")
        text = _rows(limit or len(text.tokens) + 2, "original").fit(text)
        merged.append(_merge(text, [tiles[i] for i in share], [layouts[i] for i in share], given))
    return merged


def _later(record: Mapping[str, Any]) -> None:
    """Ends the case if it needs what is not built."""
    config = record["config"]
    for word in ("maxpool2x2", "nobase"):
        if word in config.get("mm_patch_merge_type", ""):
            not_built(f"merge {word}")
    mode = config.get("image_aspect_ratio") or ""
    for name in ("anyres_max", "highres", "crop_split"):
        if name in mode:
            not_built(f"image mode {name}{'_N' * (name == 'anyres_max')}")
    if config.get("use_pos_skipping"):
        not_built("random position skipping")
    if "video" in (record["modalities"] or ()):
        not_built("faster video" if config.get("add_faster_video") else "video and newline positions")


def _texts(given: Mapping[str, np.ndarray]) -> list[Tokenized]:
    """The rows without their padding."""
    ids = given["input_ids"]
    mask = given.get("attention_mask", np.ones(ids.shape)).astype(bool)
    labels = given.get("labels", np.full(ids.shape, IGNORED))
    is_answer = (labels != IGNORED) & (ids != IMAGE_TOKEN)
    assert (labels == ids)[is_answer].all()
    return [Tokenized(ids[b][mask[b]], is_answer[b][mask[b]]) for b in range(len(ids))]


def _num_marks(text: Tokenized) -> int:
    return int((text.tokens == IMAGE_TOKEN).sum())


def _marks(texts: Sequence[Tokenized]) -> list[int]:
    return [_num_marks(text) for text in texts]


def _layouts(record: Mapping[str, Any]) -> list[Layout]:
    """Slots of every picture, by the record's merge type; tensors of one tile a picture are never merged."""
    config, vision = record["config"], record["vision"]
    shape = vision["image_size"], vision["num_patches_per_side"] ** 2
    is_list = record["image_container"] in ("list3d", "list4d", "stack5d")
    merge = config.get("mm_patch_merge_type", "flat") if is_list else "flat"
    mode = "square" if merge == "flat" else image_mode_of_original(Fields(config, "config"))
    layouts = []
    for num_tiles, size in zip(record["tiles_per_image"], map(tuple, record["image_sizes_wh"]), strict=True):
        if num_tiles == 1:
            layout = one_tile(shape[1], newline=merge == "spatial_unpad")
        elif merge == "flat":
            layout = arrange((num_tiles - 1, 1), shape[1], size=size, merge=merge, rounding="original")
        elif isinstance(mode, AnyRes):
            layout = mode.layout(size, *shape)
        elif record["source"] == "llava_next":
            # Tiles of no known grid are two by two there.
            layout = arrange((2, 2), shape[1], size=size, merge=merge, rounding="original")
        else:
            raise Impossible
        if len(layout.patches) != num_tiles:
            raise Impossible
        layouts.append(layout)
    return layouts


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
