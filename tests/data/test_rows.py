"""Rows: the arrays of packed conversations and of caption pairs, by hand."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.data.anyres import AnyRes, one_tile
from llava_jax.data.conversation import IMAGE_MARK, IMAGE_TOKEN
from llava_jax.data.records import Record, Turn, parse_record
from llava_jax.data.rows import Augment, Captions, Conversations, Example, Needs, Size
from llava_jax.data.templates import PLAIN, TEMPLATES, V1
from llava_jax.errors import DataError, Refused
from tests.tiny import make_example

IMG = IMAGE_TOKEN
RNG = np.random.default_rng(0)


class _NoTokenizer:
    """Stands in where only the end-of-sequence id matters."""

    bos_id, eos_id = 1, 2


def _needs(num_features: int) -> Needs:
    return Needs.__new__(Needs, _NoTokenizer(), ".", 2, num_features)


def _example(tokens: list[int], answers: list[int], *shades: int) -> Example:
    images = [np.full((2, 2, 3), shade, np.uint8) for shade in shades]
    return make_example(tokens, np.isin(np.arange(len(tokens)), answers), images)


def _record(data: Path, number: int) -> Record:
    return parse_record(json.loads((data / "records.json").read_text())[number])


def _rows(**changes) -> Conversations:
    return Conversations(**({"template": V1, "length": 256, "tiles": 4} | changes))


def test_one_record_fills_a_row_as_the_docstring_says():
    row = _rows(length=8, tiles=1).assemble([_example([1, IMG, IMG, 50, 60], [4], 9)], _needs(2))
    expected = {
        "tokens": [1, 0, 0, 50, 60, 0, 0, 0],
        "targets": [0, 0, 0, 60, 0, 0, 0, 0],
        "is_target": [0, 0, 0, 1, 0, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 1, 0, 0, 0],
        "positions": [0, 1, 2, 3, 4, 0, 0, 0],
        "patch_slots": [[1, 2]],
        "images": np.full((1, 2, 2, 3), 9),
    }
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(row[name], value, err_msg=name)


def test_two_records_share_a_row_without_sharing_targets():
    examples = [_example([1, IMG, IMG, 50, 60], [4], 9), _example([1, 70, IMG, IMG, IMG, IMG, 80], [1, 6], 3, 4)]
    row = _rows(length=14, tiles=4).assemble(examples, _needs(2))
    expected = {
        "tokens": [1, 0, 0, 50, 60, 1, 70, 0, 0, 0, 0, 80, 0, 0],
        "targets": [0, 0, 0, 60, 0, 70, 0, 0, 0, 0, 80, 0, 0, 0],
        "is_target": [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0],
        "segment_ids": [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0, 0],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 0, 0],
        # The unused fourth tile points past the row's end, at slots of its own.
        "patch_slots": [[1, 2], [7, 8], [9, 10], [20, 21]],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(row[name], value, err_msg=name)
    assert [int(tile.max()) for tile in row["images"]] == [9, 3, 4, 0]


@pytest.mark.parametrize("tiles", [0, 3])
def test_a_row_without_records_is_all_padding(tiles: int):
    row = _rows(length=6, tiles=tiles).assemble([], _needs(2))
    for name in ("tokens", "targets", "is_target", "segment_ids", "positions", "images"):
        assert not row[name].any(), name
    np.testing.assert_array_equal(row["patch_slots"].ravel(), np.arange(6, 6 + 2 * tiles))
    assert row["images"].shape == (tiles, 2, 2, 3)
    assert row["patch_slots"].shape[0] == tiles


def test_slots_are_distinct_and_rows_have_the_same_shapes(data: Path, needs: Needs):
    rows = _rows()
    shapes = None
    for number in range(20):
        row = rows.assemble([rows.load(_record(data, number), needs, RNG)], needs)
        assert len(np.unique(row["patch_slots"])) == row["patch_slots"].size
        found = {name: (value.shape, value.dtype) for name, value in row.items()}
        shapes = shapes or found
        assert found == shapes


def test_a_records_size_is_what_it_takes_in_a_row(data: Path, needs: Needs):
    rows = _rows()
    for number in range(10):
        record = _record(data, number)
        size = rows.measure(record, needs)
        example = rows.load(record, needs, RNG)
        assert size == Size(len(example.tokens), len(example.images))
        assert (example.tokens == IMG).sum() == size.tiles * needs.num_features


def test_pictures_lie_at_their_marks(data: Path, needs: Needs):
    rows = _rows()
    record = _record(data, 4)
    assert len(record.images) == 2
    row = rows.assemble([rows.load(record, needs, RNG)], needs)
    for place, name in enumerate(record.images):
        pixels = np.asarray(Image.open(Path(needs.image_root, name)).convert("RGB"))
        np.testing.assert_array_equal(row["images"][place], pixels)
    assert row["patch_slots"][0].max() < row["patch_slots"][1].min() < 256


def _text_record(words: int) -> Record:
    return Record((), (Turn("user", "Count."), Turn("assistant", " ".join(["one"] * words))))


def test_a_conversation_that_does_not_fit_is_refused(needs: Needs):
    record = _text_record(50)
    length = len(_rows(length=4096).tokenize(record, [], needs).tokens)
    assert _rows(length=length).measure(record, needs).tokens == length
    with pytest.raises(Refused, match=f"{length} tokens; a row has room for {length - 1}") as refusal:
        _rows(length=length - 1).measure(record, needs)
    assert refusal.value.reason == "too long"


def test_the_text_policy_cuts_the_end(needs: Needs):
    record = _text_record(50)
    whole = _rows(length=4096).tokenize(record, [], needs)
    cut = _rows(length=len(whole.tokens) - 9, overflow="text").tokenize(record, [], needs)
    np.testing.assert_array_equal(cut.tokens, whole.tokens[:-9])
    np.testing.assert_array_equal(cut.is_answer, whole.is_answer[:-9])


def test_the_text_policy_never_cuts_a_picture(data: Path, needs: Needs):
    record, layouts = _record(data, 0), [one_tile(needs.num_features)]
    tokens = _rows().tokenize(record, layouts, needs).tokens
    last = int(np.flatnonzero(tokens == IMG)[-1])
    for length in (2, last - 3, last):
        with pytest.raises(Refused, match="would cut a picture"):
            _rows(length=length, overflow="text").tokenize(record, layouts, needs)


def test_the_text_policy_never_cuts_all_answers(needs: Needs):
    record = _text_record(50)
    first = int(np.flatnonzero(_rows(length=4096).tokenize(record, [], needs).is_answer)[0])
    with pytest.raises(Refused, match="nothing to learn"):
        _rows(length=first, overflow="text").tokenize(record, [], needs)
    assert _rows(length=first + 1, overflow="text").tokenize(record, [], needs).is_answer.sum() == 1


def test_too_many_pictures_are_refused_before_they_are_decoded(data: Path, needs: Needs):
    record = _record(data, 4)
    with pytest.raises(Refused, match="2 tiles; a row has room for 1") as refusal:
        _rows(tiles=1).measure(record, needs)
    assert refusal.value.reason == "too many pictures"
    with pytest.raises(Refused, match="1 tiles; a row has room for 0"):
        _rows(tiles=0).load(_record(data, 0), needs, RNG)


@pytest.mark.parametrize(
    "turns",
    [
        (),
        (Turn("user", "Hi?"),),
        (Turn("user", "Hi?"), Turn("assistant", "")),
        (Turn("user", ""), Turn("assistant", "")),
    ],
)
def test_nothing_to_learn_is_refused(needs: Needs, turns: tuple[Turn, ...]):
    with pytest.raises(Refused) as refusal:
        _rows().measure(Record((), turns), needs)
    assert refusal.value.reason == "nothing to learn"


@pytest.mark.parametrize(
    ("images", "text"),
    [((), "<image>"), (("0_0.png",), "no mark"), (("0_0.png",), "<image><image>"), (("0_0.png", "0_0.png"), "<image>")],
)
@pytest.mark.parametrize("template", [V1, PLAIN], ids=lambda template: template.name)
def test_marks_without_pictures_are_refused(needs: Needs, template, images: tuple[str, ...], text: str):
    record = Record(images, (Turn("user", text), Turn("assistant", "yes")))
    with pytest.raises(Refused) as refusal:
        _rows(template=template).measure(record, needs)
    assert refusal.value.reason == "image count"


@pytest.mark.parametrize("changes", [{"length": 1}, {"length": 0}, {"length": -5}, {"tiles": -1}])
def test_a_row_without_room_is_refused(changes: dict):
    with pytest.raises(ValueError, match="length >= 2 and tiles >= 0"):
        _rows(**changes)


def _pair(text: str = "<image>", caption: str = "a red square", images: tuple[str, ...] = ("0_0.png",)) -> Record:
    return Record(images, (Turn("user", text), Turn("assistant", caption)))


def test_a_caption_lies_between_the_ends_of_its_sequence(needs: Needs):
    rows = Captions(length=30)
    tokenizer = needs.tokenizer
    row = rows.assemble([rows.load(_pair(), needs, RNG)], needs)
    ids = [tokenizer.bos_id, *tokenizer.encode("a red square").ids, tokenizer.eos_id]
    np.testing.assert_array_equal(row["tokens"], ids + [tokenizer.eos_id] * (30 - len(ids)))
    np.testing.assert_array_equal(row["images"], np.asarray(Image.open(Path(needs.image_root, "0_0.png"))))
    assert row["is_pair"]
    assert row["is_pair"].shape == ()


def test_a_long_caption_is_cut_and_still_ends(needs: Needs):
    rows = Captions(length=5)
    row = rows.assemble([rows.load(_pair(caption="a very long caption of a square"), needs, RNG)], needs)
    assert row["tokens"].shape == (5,)
    assert row["tokens"][0] == needs.tokenizer.bos_id
    np.testing.assert_array_equal(row["tokens"] == needs.tokenizer.eos_id, [False] * 4 + [True])


def test_a_row_without_a_pair_says_so(needs: Needs):
    row = Captions(length=5).assemble([], needs)
    assert not row["is_pair"]
    assert not row["images"].any()
    assert (row["tokens"] == needs.tokenizer.eos_id).all()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (_pair(images=()), "not a caption"),
        (_pair(images=("0_0.png", "0_0.png")), "not a caption"),
        (Record(("0_0.png",), (Turn("user", "<image>"),)), "not a caption"),
        (Record(("0_0.png",), ()), "not a caption"),
        (_pair(text="no mark"), "image count"),
        (_pair(text="<image><image>"), "image count"),
        (_pair(caption=" \n"), "nothing to learn"),
        (_pair(images=("none.png",)), "missing picture"),
        (_pair(images=("../records.json",)), "path outside the folder"),
    ],
)
def test_what_is_no_caption_is_refused(needs: Needs, record: Record, reason: str):
    with pytest.raises(Refused) as refusal:
        Captions(length=16).measure(record, needs)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_captions_without_room_for_their_ends_are_refused(length: int):
    with pytest.raises(ValueError, match="length"):
        Captions(length=length)


@pytest.mark.parametrize("augment", [Augment(mirror=True), Augment(shift=3), Augment(mirror=True, shift=2), Augment()])
@pytest.mark.parametrize("shape", [(8, 8, 3), (5, 9, 3), (1, 1, 3)])
def test_augmentation_keeps_shape_and_dtype_and_follows_its_generator(augment: Augment, shape: tuple[int, ...]):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    before = image.copy()
    for seed in range(8):
        first, second = augment(image, np.random.default_rng(seed)), augment(image, np.random.default_rng(seed))
        assert first.shape == image.shape
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(image, before)


def test_augmentation_mirrors_and_shifts_every_way():
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    seen = {Augment(mirror=True)(image, np.random.default_rng(seed)).tobytes() for seed in range(50)}
    assert seen == {np.ascontiguousarray(image[:, ::h]).tobytes() for h in (1, -1)}
    assert len({Augment(shift=1)(image, np.random.default_rng(seed)).tobytes() for seed in range(200)}) == 9
    np.testing.assert_array_equal(Augment()(image, np.random.default_rng(0)), image)


def test_what_a_shift_brings_in_is_the_colour_of_the_corners():
    image = np.full((4, 4, 3), 7, np.uint8)
    image[1:3, 1:3] = 200
    for seed in range(20):
        shifted = Augment(shift=2)(image, np.random.default_rng(seed))
        assert set(shifted[[0, 0, -1, -1], [0, -1, 0, -1]].ravel()) <= {7, 200}
        assert (shifted == 200).sum() <= 12


NEXT = AnyRes(pinpoints=((16, 32), (32, 16), (32, 32)), merge="spatial_unpad", rounding="original")


@pytest.fixture
def sized(needs: Needs, tmp_path: Path) -> Callable[..., tuple[Record, Needs]]:
    """A record with pictures of these sizes, and where they lie."""

    def make(*sizes: tuple[int, int], marks: int | None = None) -> tuple[Record, Needs]:
        for i, size in enumerate(sizes):
            pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        question = IMAGE_MARK * (len(sizes) if marks is None else marks) + "What?"
        names = tuple(f"{i}.png" for i in range(len(sizes)))
        return Record(names, (Turn("user", question), Turn("assistant", "one"))), needs._replace(
            image_root=str(tmp_path)
        )

    return make


def test_pictures_of_any_size_take_the_slots_that_their_headers_say(sized):
    rows = _rows(image_mode=NEXT, tiles=9, length=512)
    record, needs = sized((20, 40), (40, 20), (9, 9))
    example = rows.load(record, needs, RNG)
    layouts = [NEXT.layout(size, 16, 16) for size in ((20, 40), (40, 20), (9, 9))]
    assert [len(layout.patches) for layout in layouts] == [3, 3, 3]
    assert rows.measure(record, needs) == Size(len(example.tokens), 9)
    assert (example.tokens == IMG).sum() == sum(layout.num_slots for layout in layouts)


def test_a_row_of_tiles_says_where_patches_and_newlines_land(sized):
    rows = _rows(image_mode=NEXT, tiles=9, length=512)
    first, needs = sized((20, 60))
    text = _text_record(3)
    examples = [rows.load(record, needs, RNG) for record in (text, first)]
    row = rows.assemble(examples, needs)
    at = len(examples[0].tokens)
    layout = NEXT.layout((20, 60), 16, 16)
    start = at + int(np.flatnonzero(examples[1].tokens == IMG)[0])
    landed = row["patch_slots"][:3]
    np.testing.assert_array_equal(landed[layout.patches >= 0], start + layout.patches[layout.patches >= 0])
    assert (layout.patches < 0).any(), "this picture is padded"
    np.testing.assert_array_equal(np.flatnonzero(row["is_newline"]), start + layout.newlines)
    assert len(np.unique(row["patch_slots"])) == row["patch_slots"].size
    assert (landed[layout.patches < 0] >= rows.length).all()
    assert (row["patch_slots"][3:] >= rows.length).all()
    assert not row["is_target"][start - 1 : start + layout.num_slots - 1].any()


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_rows_without_newlines_say_nothing_of_them(merge, sized):
    rows = _rows(image_mode=dataclasses.replace(NEXT, merge=merge), tiles=8)
    record, needs = sized((20, 40))
    row = rows.assemble([rows.load(record, needs, RNG)], needs)
    assert "is_newline" not in row
    assert (row["patch_slots"] < rows.length).sum() == 3 * 16


def test_the_budget_of_a_row_counts_tiles(sized):
    record, needs = sized((20, 40), (40, 40))
    assert _rows(image_mode=NEXT, tiles=9, length=512).measure(record, needs).tiles == 8
    with pytest.raises(Refused, match="8 tiles; a row has room for 7"):
        _rows(image_mode=NEXT, tiles=7, length=512).measure(record, needs)


def test_a_picture_that_grew_since_it_was_measured_is_noticed(sized):
    rows = _rows(image_mode=NEXT, tiles=3)
    record, needs = sized((20, 40))
    rows.measure(record, needs)
    sized((40, 40))
    with pytest.raises(Refused, match="5 tiles; a row has room for 3"):
        rows.load(record, needs, RNG)
    # Two records that shared a row when they were measured.
    wide = dataclasses.replace(rows, tiles=5)
    with pytest.raises(DataError, match=r"5 tiles; they take Size\(.*remove the workdir's cache/"):
        wide.assemble([wide.load(record, needs, RNG)] * 2, needs)


def test_compat_original_cuts_through_pictures_and_ignores_those_without_a_mark(sized):
    record, needs = sized((16, 16), (16, 16), marks=1)
    with pytest.raises(Refused, match="1 <image> marks in the text for 2 pictures"):
        _rows().measure(record, needs)
    rows = _rows(compat="original")
    example = rows.load(record, needs, RNG)
    assert (example.tokens == IMG).sum() == 16
    assert len(example.images) == len(example.patch_slots) == 1
    assert rows.measure(record, needs).tiles == 1
    record, needs = sized((16, 16))
    hello = (Turn("user", "Hi."), Turn("assistant", "one"))
    reordered = Record(record.images, (*hello, *record.turns))
    as_original = {"template": TEMPLATES["llava_v0"], "compat": "original"}
    whole = _rows(length=4096, **as_original).load(reordered, needs, RNG)
    length = int(np.flatnonzero(whole.tokens == IMG)[5])
    with pytest.raises(Refused, match="would cut a picture"):
        _rows(length=length, template=TEMPLATES["llava_v0"], overflow="text").load(reordered, needs, RNG)
    cut = _rows(length=length, **as_original).load(reordered, needs, RNG)
    np.testing.assert_array_equal(cut.tokens, whole.tokens[:length])
    np.testing.assert_array_equal(cut.patch_slots, np.where(whole.patch_slots < length, whole.patch_slots, -1))
    row = _rows(length=length, **as_original).assemble([cut], needs)
    assert len(np.unique(row["patch_slots"])) == row["patch_slots"].size
