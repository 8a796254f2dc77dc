"""Conversations: from turns to text spans, and from spans to token ids with their mask."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from llava_jax.data.records import Turn
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import Refused

IMAGE_MARK = "<image>"
# Sentinel of a picture's slots on the host (`IMAGE_TOKEN_INDEX` of the original); never reaches the device.
IMAGE_TOKEN = -200
IM_START, IM_END, IM_PATCH = "<im_start>", "<im_end>", "<im_patch>"


class Span(NamedTuple):
    """A stretch of the prompt; `is_answer` marks what is trained on, `is_picture` a picture's place."""

    text: str
    is_answer: bool = False
    is_picture: bool = False


Style = Callable[["Template", Sequence[Turn]], list[Span]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become one text. The styles lay out the spans; the other fields are their words.

    `ends` closes a user's and an assistant's turn. `style` is the prompt of inference, `lesson` the text of training
    where that differs. `examples` open every prompt, but no lesson. `picture` is what is written for a picture.
    Source: `llava/conversation.py` of the original.
    """

    name: str
    system: str
    roles: tuple[str, str]
    ends: tuple[str, str]
    style: Style
    lesson: Style | None = None
    examples: tuple[Turn, ...] = ()
    picture: str = IMAGE_MARK

    def render(self, turns: Sequence[Turn], *, opened: bool = False) -> list[Span]:
        """The prompt (`get_prompt`); `opened` adds the words after which the assistant begins to answer."""
        turns = [*self.examples, *turns]
        return self.style(self, [*turns, Turn("assistant", "")] if opened else turns)

    def teach(self, turns: Sequence[Turn]) -> list[Span]:
        """The text of training."""
        return (self.lesson or self.style)(self, turns)

    def arrange(self, turns: Sequence[Turn], *, unplaced: int = 0) -> list[Turn]:
        """The turns with every picture of a question where and as the template writes it.

        `unplaced` pictures without a mark come before the first question, or, where the template tags its pictures,
        in an exchange of their own, as in the original's chats. A mark in an answer is a word of the answer: no
        picture is ever read from there.
        """
        opening: list[Turn] = []
        if unplaced and self.picture.startswith("<Image>"):
            opening = [Turn("user", self.picture * unplaced), Turn("assistant", "Received.")]
        elif unplaced:
            first, *turns = turns
            opening = [Turn(first.role, f"{self.picture}\n" * unplaced + first.text.strip())]
        arranged = [
            Turn(turn.role, move_image_first(turn.text).replace(IMAGE_MARK, self.picture))
            if turn.role == "user"
            else turn
            for turn in turns
        ]
        return opening + arranged

    def framed(self) -> "Template":
        """The template with `<im_start>` and `<im_end>` around each picture (`mm_use_im_start_end`)."""
        return dataclasses.replace(self, picture=self.picture.replace(IMAGE_MARK, IM_START + IMAGE_MARK + IM_END))


def move_image_first(text: str) -> str:
    r"""Puts a turn's single picture on a line of its own in front (`preprocess_multimodal` of the original).

    Several pictures keep their places: interleaving carries meaning. So does one whose neighbours would become a mark.

    Example:
        "Look at this <image> and count."   ->   "<image>\nLook at this  and count."
    """
    words = text.replace(IMAGE_MARK, "")
    if text.count(IMAGE_MARK) != 1 or IMAGE_MARK in words:
        return text
    return f"{IMAGE_MARK}\n{words.strip()}".strip()


def marked(text: str) -> list[Span]:
    r"""Spans of a text in which every `<image>` is a picture.

    Example:
        "USER: <image>\nWhy?"   ->   [Span("USER: "), Span("<image>", is_picture=True), Span("\nWhy?")]
    """
    first, *others = text.split(IMAGE_MARK)
    spans = [Span(first)]
    for other in others:
        spans += [Span(IMAGE_MARK, is_picture=True), Span(other)]
    return [span for span in spans if span.text]


class Tokenized(NamedTuple):
    """One sequence; a picture's slots hold `IMAGE_TOKEN`."""

    tokens: Int[np.ndarray, " t"]
    is_answer: Bool[np.ndarray, " t"]


def tokenize(spans: Sequence[Span], tokenizer: Tokenizer, image_slots: Sequence[int]) -> Tokenized:
    r"""Token ids of a rendered conversation, each picture widened to the slots that its features take.

    Text between pictures is tokenized in one piece (`tokenizer_image_token` of the original), and a token is
    an answer's if it starts inside an answer span, so that no mask depends on re-tokenizing anything.

    Example, with 3 slots:
        "<image>\nHi? Yes"   ->   [bos, -200, -200, -200, newline, Hi, ?, Yes]

    Raises:
      Refused: the number of marks differs from the number of pictures.
    """
    chunks: list[list[Span]] = [[]]
    for span in spans:
        if span.is_picture:
            chunks.append([])
        else:
            chunks[-1].append(span)
    if len(chunks) - 1 != len(image_slots):
        raise Refused(
            "image count", f"{len(chunks) - 1} {IMAGE_MARK} marks in the text for {len(image_slots)} pictures"
        )
    pieces = [np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)]
    masks = [np.zeros(len(pieces[0]), bool)]
    for i, chunk in enumerate(chunks):
        if i > 0:
            pieces.append(np.full(image_slots[i - 1], IMAGE_TOKEN, np.int32))
            masks.append(np.zeros(image_slots[i - 1], bool))
        ids, starts = tokenizer.encode("".join(span.text for span in chunk))
        edges = np.cumsum([0, *(len(span.text) for span in chunk)])
        answers = np.array([span.is_answer for span in chunk] + [False])
        pieces.append(ids)
        masks.append(answers[np.searchsorted(edges, starts, side="right") - 1])
    return Tokenized(np.concatenate(pieces), np.concatenate(masks))
