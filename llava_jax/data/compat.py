"""What the original does where it is wrong: masks by counting re-tokenized pieces, and what leads up to them.

Used only under `compat="original"` (haotian-liu/LLaVA, `llava/train/train.py`) and `compat="next"` (LLaVA-VL/
LLaVA-NeXT, the same file), to repeat a published run or to compare with one. `docs/compat.md` lists every difference
from the default path, with its reason; that path calls nothing of this module.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from llava_jax.data.conversation import IM_END, IM_START, IMAGE_MARK, IMAGE_TOKEN, Template, Tokenized
from llava_jax.data.records import Turn
from llava_jax.data.templates import TEMPLATES, chatml, dialogue, instruct, lines, paragraphs
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import Refused

Compat = Literal["original", "next"]
# `train()` leaves the default template in force for these versions.
_UNCHANGED = {"original": {"v0": "v1", "v0.5": "v1"}, "next": {"v0": "default", "v0.5": "default"}}
# Names that only one of the two knows; the other takes them for unknown ones.
_ONLY = {
    "original": {"v1_mmtag", "v0_mmtag"},
    "next": {
        "llava_v1_mmtag",
        "llava_v0_mmtag",
        "llava_llama_2_simple",
        "llava_llama_2_mmtag",
        "llava_mistral_instruct",
        "mistral_orca",
        "mistral_zephyr",
    },
}


class Supervised(NamedTuple):
    """Ids with one `IMAGE_TOKEN` per picture, which of them are labels, and whether the original printed a warning."""

    tokens: Int[np.ndarray, " t"]
    is_label: Bool[np.ndarray, " t"]
    is_mismatch: bool


def template_of(version: str, compat: Compat) -> Template:
    """The template that `--version` leads to; an unknown one leads to v1, without a word."""
    name = _UNCHANGED[compat].get(version, version)
    is_known = name in TEMPLATES and not any(name in names for who, names in _ONLY.items() if who != compat)
    return TEMPLATES[name if is_known else "v1"]


def pad_id_of(version: str, tokenizer: Tokenizer) -> int | None:
    """The id that the original counts as padding: `[PAD]` for v0, else the unknown token where there is one."""
    if version == "v0":
        return tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.token_id("[PAD]")
    return tokenizer.unk_id if tokenizer.unk_id is not None else tokenizer.pad_id


def arrange(template: Template, turns: Sequence[Turn], compat: Compat) -> list[Turn]:
    """`preprocess_multimodal`: in every turn, answers included, pictures collapse into one in front.

    LLaVA-NeXT moves a single picture only, and tags and strips only what it moves.
    """
    arranged = []
    frame = IM_START in template.picture
    tag = template.picture.replace(IM_START, "").replace(IM_END, "")
    for role, text in turns:
        marks = text.count(IMAGE_MARK)
        is_moved = marks > 0 if compat == "original" else marks == 1 and not text.startswith(IMAGE_MARK)
        if is_moved:
            text = f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()
            text = text.replace(IMAGE_MARK, tag)
        if frame:
            text = text.replace(IMAGE_MARK, IM_START + IMAGE_MARK + IM_END)
        if compat == "next":
            text = text.replace("QA_GT_caption_based_noisy", "")
        arranged.append(Turn(role, text))
    return arranged


def supervise(
    template: Template,
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    *,
    has_image: bool,
    length: int,
    pad_id: int | None,
    compat: Compat,
) -> Supervised:
    """Ids and labels of `preprocess()`; `turns` as the record has them, arranged if it has a picture.

    `length` is `model_max_length`; `pad_id` the token whose occurrences the original takes for padding.

    Raises:
      Refused: where the original stops with an exception.
    """
    sequence = _Sequence(tokenizer, has_image=has_image, length=length, pad_id=pad_id)
    if template.style is lines:
        return _plain(template, turns, sequence)
    if template.lesson is paragraphs:
        return _paragraphs(template, turns, sequence)
    if turns and turns[0].role != "user":
        turns = turns[1:]
    if not turns or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise Refused("malformed", "turns must alternate between human and gpt")
    text = "".join(span.text for span in template.style(template, turns))
    if template.style is dialogue:
        rounds = _rounds(text.split(template.ends[1]), f"{template.ends[0]}{template.roles[1]}: ")
        steps = [(2 + later, later) for later in _later(rounds, tokenizer.legacy is False)]
        if tokenizer.legacy is None and len(rounds) > 1:
            raise Refused("malformed", "preprocess_v1 needs a tokenizer that has the attribute legacy")
        return _count(text, rounds, steps, sequence, first=1)
    if template.style is instruct:
        rounds = _rounds(text.split(template.ends[1]), "[/INST] ")
        return _count(text, rounds, [(2, 0)] * len(rounds), sequence, first=1)
    assert template.style is chatml, f"no masks of the original for {template.name}"
    end = template.ends[1]
    pieces = text.split(end)
    joined = [end.join(pieces[:3]), *(end.join(pieces[i : i + 2]) for i in range(3, len(pieces), 2))]
    rounds = _rounds(joined, end + template.roles[1])
    steps = [(1 - later, -later) for later in _later(rounds, tokenizer.legacy is True)]
    return _count(text, rounds, steps, sequence, first=0 if compat == "original" else 1)


def tokenize(
    template: Template,
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    image_slots: Sequence[int],
    *,
    length: int,
    compat: Compat,
) -> Tokenized:
    """What `conversation.tokenize` gives, the original's way: surplus pictures of a record are left out.

    Raises:
      Refused: the original stops with an exception, or takes the missing picture from another record.
    """
    if image_slots:
        turns = arrange(template, turns, compat)
    pad_id = pad_id_of(template.name, tokenizer)
    tokens, is_label, _ = supervise(
        template, turns, tokenizer, has_image=bool(image_slots), length=length, pad_id=pad_id, compat=compat
    )
    is_picture = tokens == IMAGE_TOKEN
    if is_picture.sum() > len(image_slots):
        raise Refused("image count", f"{is_picture.sum()} {IMAGE_MARK} marks for {len(image_slots)} pictures")
    widths = np.ones(len(tokens), np.int64)
    widths[is_picture] = image_slots[: is_picture.sum()]
    return Tokenized(np.repeat(tokens, widths), np.repeat(is_label & ~is_picture, widths))


class _Round(NamedTuple):
    text: str
    instruction: str


class _Sequence:
    """The tokenizer as `preprocess()` calls it: with BOS, around pictures or cut to the model's length."""

    def __init__(self, tokenizer: Tokenizer, *, has_image: bool, length: int, pad_id: int | None):
        self.tokenizer = tokenizer
        self.has_image = has_image
        self.length = length
        self.pad_id = pad_id

    def plain(self, text: str) -> list[int]:
        opening = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return opening + self.tokenizer.encode(text).ids.tolist()

    def around_pictures(self, text: str) -> list[int]:
        """`tokenizer_image_token`."""
        chunks = [self.plain(chunk) for chunk in text.split(IMAGE_MARK)]
        opens = bool(chunks[0]) and chunks[0][0] == self.tokenizer.bos_id
        ids = chunks[0][: int(opens)]
        for i, chunk in enumerate(chunks):
            ids += [IMAGE_TOKEN] * (i > 0) + chunk[int(opens) :]
        return ids

    def piece(self, text: str) -> list[int]:
        return self.around_pictures(text) if self.has_image else self.plain(text)

    def whole(self, text: str) -> list[int]:
        return self.around_pictures(text) if self.has_image else self.plain(text)[: self.length]

    def unpadded(self, ids: Sequence[int]) -> int:
        return sum(token_id != self.pad_id for token_id in ids)


def _rounds(texts: Sequence[str], separator: str) -> list[_Round]:
    """Rounds up to the first that is empty or does not hold the separator exactly once."""
    rounds = []
    for text in texts:
        parts = text.split(separator)
        if len(parts) != 2:
            break
        rounds.append(_Round(text, parts[0] + separator))
    return rounds


def _later(rounds: Sequence[_Round], applies: bool) -> list[int]:
    return [int(applies and i > 0) for i in range(len(rounds))]


def _count(
    text: str, rounds: Sequence[_Round], steps: Sequence[tuple[int, int]], sequence: _Sequence, *, first: int
) -> Supervised:
    """Labels by adding up the lengths of rounds; if the sum is not the whole length, nothing is a label.

    `steps` holds what is subtracted from the instruction's and the round's length. No sum is checked that reaches
    the model's length.
    """
    ids = sequence.whole(text)
    is_label = np.ones(len(ids), bool)
    is_label[:first] = False
    at = first
    for (whole, instruction), (from_instruction, from_round) in zip(rounds, steps, strict=True):
        is_label[at : at + len(sequence.piece(instruction)) - from_instruction] = False
        at += len(sequence.piece(whole)) - from_round
    is_label[at:] = False
    is_mismatch = at < sequence.length and at != sequence.unpadded(ids)
    return Supervised(np.array(ids, np.int32), is_label & (not is_mismatch), is_mismatch)


def _plain(template: Template, turns: Sequence[Turn], sequence: _Sequence) -> Supervised:
    if len(turns) != 2 or IMAGE_MARK not in turns[0].text:
        raise Refused("malformed", f"plain needs a question with {IMAGE_MARK} and an answer")
    ids = sequence.around_pictures(IMAGE_MARK + turns[1].text + template.ends[1])
    is_label = np.arange(len(ids)) >= len(sequence.around_pictures(IMAGE_MARK))
    return Supervised(np.array(ids, np.int32), is_label, False)


def _paragraphs(template: Template, turns: Sequence[Turn], sequence: _Sequence) -> Supervised:
    """The `###` templates: lengths of turns tokenized alone, each with a BOS of its own, so that masks drift."""
    header = f"{template.system}\n\n"
    texts = [f"### {template.roles[turn.role == 'assistant']}: {turn.text}\n" for turn in turns]
    ids = sequence.whole("".join([header, *texts, "### "]))
    pieces = [sequence.whole(text) for text in (header, *texts)]
    lengths = [len(piece) if sequence.has_image else sequence.unpadded(piece) for piece in pieces]
    is_label = np.ones(len(ids), bool)
    at = lengths[0]
    is_label[:at] = False
    for turn, length in zip(turns, lengths[1:], strict=True):
        if turn.role == "user":
            is_label[at + 2 : at + length] = False
        at += length
    return Supervised(np.array(ids, np.int32), is_label, False)


def share(marks: Sequence[int], num_pictures: int, compat: Compat) -> list[list[int]]:
    """Which of a batch's pictures every row shows, by the number of its marks, whosever pictures they are.

    One cursor runs through all pictures, and a row without a mark passes one by
    (`prepare_inputs_labels_for_multimodal`). Where one is missing, LLaVA-NeXT shows the last once more.

    Example, rows of 1, 0 and 2 marks, 4 pictures:
        [[0], [], [2, 3]]

    Raises:
      Refused: the original stops with an exception.
    """
    shares, at = [], 0
    spare = int(compat == "next" and num_pictures > 0)
    for count in marks:
        last = at + max(count, 1)
        if last > num_pictures + spare * (count > 0):
            raise Refused("image count", f"{sum(marks)} {IMAGE_MARK} marks for {num_pictures} pictures")
        shares.append([min(i, num_pictures - 1) for i in range(at, at + count)])
        at = last
    return shares


def collate(
    examples: Sequence[Supervised], *, length: int, pad_id: int, compat: Compat, side: Literal["left", "right"]
) -> tuple[Int[np.ndarray, "b t"], Bool[np.ndarray, "b t"], Bool[np.ndarray, "b t"]]:
    """Ids, labels and attention of a padded batch (`DataCollatorForSupervisedDataset`), where we pack instead.

    The original pads and then cuts to `length`, LLaVA-NeXT cuts and then pads; whatever equals the padding, an
    unknown token for instance, is not attended to.
    """
    cut = length if compat == "next" else None
    rows = [(example.tokens[:cut], example.is_label[:cut]) for example in examples]
    width = max(len(tokens) for tokens, _ in rows)
    ids = np.full((len(rows), width), pad_id, np.int32)
    is_label = np.zeros((len(rows), width), bool)
    for i, (tokens, labels) in enumerate(rows):
        at = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        ids[i, at], is_label[i, at] = tokens, labels
    ids, is_label = ids[:, :length], is_label[:, :length]
    return ids, is_label, ids != pad_id
