"""From records to the static arrays of one row: packed conversations, or one caption pair."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from llava_jax.data import compat as original
from llava_jax.data.anyres import AnyRes, Layout, find_slots
from llava_jax.data.conversation import (
    IM_END,
    IM_PATCH,
    IM_START,
    IMAGE_MARK,
    IMAGE_TOKEN,
    Template,
    Tokenized,
    tokenize,
)
from llava_jax.data.images import ImageMode, OneTile, cut_tiles, decode, find_layout, find_picture, open_image
from llava_jax.data.records import Record
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import DataError, Refused

Row = dict[str, np.ndarray]


class Size(NamedTuple):
    """What a record takes of a row, or what a row has: token slots and tiles."""

    tokens: int
    tiles: int


class Needs(NamedTuple):
    """What turning records into arrays needs to know of the run.

    A tile has `num_features` patches; the decoder knows `max_positions` (None where it does not matter).
    """

    tokenizer: Tokenizer
    image_root: str
    image_size: int
    num_features: int
    max_positions: int | None = None


class Example(NamedTuple):
    """One record, ready to be laid into a row.

    A picture's slots in `tokens` hold `IMAGE_TOKEN`; `images` are the tiles of all pictures; `patch_slots` and
    `is_newline` say what goes into the slots (see `find_slots`).
    """

    tokens: Int[np.ndarray, " t"]
    is_answer: Bool[np.ndarray, " t"]
    images: UInt8[np.ndarray, "i size size 3"]
    patch_slots: Int[np.ndarray, "i p"]
    is_newline: Bool[np.ndarray, " t"]


def make_example(
    text: Tokenized, tiles: Sequence[UInt8[np.ndarray, "_ size size 3"]], layouts: Sequence[Layout], image_size: int
) -> Example:
    """A sequence with the tiles of its pictures, each picture's slots found by its layout."""
    none = np.zeros((0, image_size, image_size, 3), np.uint8)
    return Example(*text, np.concatenate([none, *tiles]), *find_slots(text.tokens == IMAGE_TOKEN, layouts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations:
    """Rows of `length` tokens and `tiles` tiles of pictures, filled with whole conversations.

    `overflow` says what happens to a conversation that is longer than a row: `refuse` it, or cut its `text`
    (never through a picture, and never all of its answers). `mm_use_im_start_end` frames every picture by
    `<im_start>` and `<im_end>`; that and `mm_use_im_patch_token` add tokens (`added_tokens`), both as the original's
    options of these names. `compat` repeats the original where it is wrong, see `docs/compat.md`.
    """

    template: Template
    length: int
    tiles: int
    image_mode: ImageMode = "pad"
    overflow: Literal["refuse", "text"] = "refuse"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    compat: original.Compat | None = None

    def __post_init__(self) -> None:
        if self.length < 2 or self.tiles < 0:
            raise ValueError(f"A row needs length >= 2 and tiles >= 0; got length={self.length}, tiles={self.tiles}.")

    @property
    def capacity(self) -> Size:
        return Size(self.length, self.tiles)

    @property
    def as_written(self) -> bool:
        """Whether records come with all of their turns, alternating or not."""
        return self.compat is not None

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """What the tokenizer needs besides its own tokens, in the order in which the original adds it."""
        return (IM_PATCH,) * self.mm_use_im_patch_token + (IM_START, IM_END) * self.mm_use_im_start_end

    def measure(self, record: Record, needs: Needs) -> Size:
        """What the record takes; raises `Refused` for everything that its text and picture headers show."""
        images, layouts = self._open(record, needs)
        for image in images:
            image.close()
        text = self.tokenize(record, layouts, needs)
        if needs.max_positions is not None and len(text.tokens) > needs.max_positions:
            raise Refused("too long", f"{len(text.tokens)} tokens; the decoder has {needs.max_positions} positions")
        return Size(len(text.tokens), _num_tiles(layouts[: _num_placed(text, layouts)]))

    def tokenize(self, record: Record, layouts: Sequence[Layout], needs: Needs) -> Tokenized:
        """Ids and answer mask of one record, cut to the row if the overflow policy says so."""
        template = self.template.framed() if self.mm_use_im_start_end else self.template
        slots = [layout.num_slots for layout in layouts]
        if self.compat is None:
            text = tokenize(template.teach(template.arrange(record.turns)), needs.tokenizer, slots)
        else:
            text = original.tokenize(
                template, record.turns, needs.tokenizer, slots, length=self.length, compat=self.compat
            )
        text = self.fit(text)
        tiles = _num_tiles(layouts[: _num_placed(text, layouts)])
        if tiles > self.tiles:
            raise Refused("too many pictures", f"{tiles} tiles; a row has room for {self.tiles}")
        if not text.is_answer[1:].any():
            raise Refused("nothing to learn", "no answer token is left to train on")
        return text

    def fit(self, text: Tokenized) -> Tokenized:
        """The sequence, cut to the row if it is longer and the overflow policy lets it."""
        length = len(text.tokens)
        if length > self.length and self.compat is None:
            if self.overflow == "refuse":
                raise Refused("too long", f"{length} tokens; a row has room for {self.length}")
            if (text.tokens[self.length :] == IMAGE_TOKEN).any():
                raise Refused("too long", f"cutting {length} tokens to {self.length} would cut a picture")
        return Tokenized(text.tokens[: self.length], text.is_answer[: self.length])

    def load(self, record: Record, needs: Needs, rng: np.random.Generator) -> Example:
        """The record's tokens and decoded pictures."""
        del rng
        images, layouts = self._open(record, needs)
        text = self.tokenize(record, layouts, needs)
        placed = _num_placed(text, layouts)
        tiles = [cut_tiles(image, size=needs.image_size, mode=self.image_mode) for image in images[:placed]]
        return make_example(text, tiles, layouts[:placed], needs.image_size)

    def _open(self, record: Record, needs: Needs) -> tuple[list[Image.Image], list[Layout]]:
        """The record's pictures, headers read, and the slots that they take."""
        images = [open_image(find_picture(needs.image_root, name)) for name in record.images]
        shape = {"image_size": needs.image_size, "num_features": needs.num_features}
        return images, [find_layout(image.size, self.image_mode, **shape) for image in images]

    def assemble(self, examples: Sequence[Example], needs: Needs) -> Row:
        """One row from examples that fit together; segment 0 is padding.

        A patch that lands nowhere, of an unused tile or cut away, gets a slot of its own past the end of the row,
        where the scatter drops it. Rows have `is_newline` if the image mode ends rows of patches with newlines.

        Example, length=8, one record of tokens [bos, img, img, hi, yes] whose last token is an answer:
            tokens      = [bos, 0, 0, hi, yes, 0, 0, 0]     segment_ids = [1, 1, 1, 1, 1, 0, 0, 0]
            targets     = [0,   0, 0, yes,  0, 0, 0, 0]     is_target   = [0, 0, 0, 1, 0, 0, 0, 0]
            positions   = [0,   1, 2,   3,  4, 0, 0, 0]     patch_slots = [[1, 2]]

        Raises:
          DataError: the examples take more than the row has: a picture changed its size after it was measured.
        """
        taken = Size(sum(len(example.tokens) for example in examples), sum(len(e.images) for e in examples))
        if taken.tokens > self.length or taken.tiles > self.tiles:
            raise DataError(
                f"Records of a row must fit its {self.length} tokens and {self.tiles} tiles; they take {taken}. A "
                "picture has changed since it was measured: remove the workdir's cache/ and run again."
            )
        patches = self.tiles * needs.num_features
        row = {
            "tokens": np.zeros(self.length, np.int32),
            "targets": np.zeros(self.length, np.int32),
            "is_target": np.zeros(self.length, bool),
            "segment_ids": np.zeros(self.length, np.int32),
            "positions": np.zeros(self.length, np.int32),
            "images": np.zeros((self.tiles, needs.image_size, needs.image_size, 3), np.uint8),
            "patch_slots": np.arange(self.length, self.length + patches, dtype=np.int32).reshape(
                self.tiles, needs.num_features
            ),
        }
        if isinstance(self.image_mode, AnyRes) and self.image_mode.has_newlines:
            row["is_newline"] = np.zeros(self.length, bool)
        at = tile = 0
        for segment, (tokens, is_answer, images, patch_slots, is_newline) in enumerate(examples, start=1):
            end, last = at + len(tokens), tile + len(images)
            row["tokens"][at:end] = np.where(tokens == IMAGE_TOKEN, 0, tokens)
            row["segment_ids"][at:end] = segment
            row["positions"][at:end] = np.arange(len(tokens))
            row["targets"][at : end - 1] = np.where(is_answer[1:], tokens[1:], 0)
            row["is_target"][at : end - 1] = is_answer[1:]
            if len(images):
                row["images"][tile:last] = images
                free = row["patch_slots"][tile:last]
                row["patch_slots"][tile:last] = np.where(patch_slots < 0, free, at + patch_slots)
            if "is_newline" in row:
                row["is_newline"][at:end] = is_newline
            at, tile = end, last
        return row


def _num_tiles(layouts: Sequence[Layout]) -> int:
    return sum(len(layout.patches) for layout in layouts)


def _num_placed(text: Tokenized, layouts: Sequence[Layout]) -> int:
    """How many of the pictures have a slot: under `compat` those without a mark and those cut away have none."""
    if not layouts:
        return 0
    starts = np.cumsum([0, *(layout.num_slots for layout in layouts)])[:-1]
    return int((starts < np.count_nonzero(text.tokens == IMAGE_TOKEN)).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Random mirroring, and shifts of at most `shift` pixels; what comes in is the median colour of the corners."""

    mirror: bool = False
    shift: int = 0

    def __call__(
        self, image: UInt8[np.ndarray, "height width 3"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "height width 3"]:
        height, width, _ = image.shape
        if self.mirror:
            image = image[:, :: rng.choice([1, -1])]
        if self.shift:
            down, right = rng.integers(0, 2 * self.shift + 1, size=2)
            corners = np.sort(image[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
            wide = np.empty((height + 2 * self.shift, width + 2 * self.shift, 3), np.uint8)
            wide[...] = np.tile(corners[1:3].mean(axis=0).astype(np.uint8), len(wide[0])).reshape(-1, 3)
            wide[self.shift : self.shift + height, self.shift : self.shift + width] = image
            image = wide[down : down + height, right : right + width]
        return image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
    """Rows of one picture and its caption between BOS and EOS, for contrastive training.

    The caption is the answer of the record's single exchange; a longer one is cut to `length` as CLIP does.
    """

    length: int
    image_mode: OneTile = "square"
    augment: Augment | None = None

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"A caption needs length >= 2, for BOS and EOS; got length={self.length}.")

    @property
    def capacity(self) -> Size:
        return Size(1, 1)

    @property
    def as_written(self) -> bool:
        return False

    @property
    def added_tokens(self) -> tuple[str, ...]:
        return ()

    def measure(self, record: Record, needs: Needs) -> Size:
        if len(record.images) != 1 or len(record.turns) != 2:
            raise Refused(
                "not a caption", f"needs one picture and one exchange; got {len(record.images)}, {len(record.turns)}"
            )
        if record.turns[0].text.count(IMAGE_MARK) != 1:
            raise Refused("image count", f"the question must hold one {IMAGE_MARK}; got {record.turns[0].text!r}")
        if not record.turns[1].text.strip():
            raise Refused("nothing to learn", "the caption is empty")
        open_image(find_picture(needs.image_root, record.images[0])).close()
        return self.capacity

    def load(self, record: Record, needs: Needs, rng: np.random.Generator) -> Example:
        """The caption's tokens and the decoded, perhaps augmented, picture."""
        tokenizer = needs.tokenizer
        opening = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = [*opening, *tokenizer.encode(record.turns[1].text).ids][: self.length - 1] + [tokenizer.eos_id]
        image = open_image(find_picture(needs.image_root, record.images[0]))
        pixels = decode(image, size=needs.image_size, mode=self.image_mode)
        if self.augment is not None:
            pixels = self.augment(pixels, rng)
        text = Tokenized(np.array(ids, np.int32), np.ones(len(ids), bool))
        return make_example(text, [pixels[None]], [], needs.image_size)

    def assemble(self, examples: Sequence[Example], needs: Needs) -> Row:
        """One pair; without an example a row that is no pair, neither an example nor anybody's negative."""
        row = {
            "tokens": np.full(self.length, needs.tokenizer.eos_id, np.int32),
            "images": np.zeros((needs.image_size, needs.image_size, 3), np.uint8),
            "is_pair": np.array(bool(examples)),
        }
        for example in examples:
            row["tokens"][: len(example.tokens)] = example.tokens
            row["images"][...] = example.images[0]
        return row


RowFormat = Conversations | Captions
