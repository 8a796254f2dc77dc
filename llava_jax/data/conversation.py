"""Conversation templates: from turns to text spans, and from spans to token ids with their mask."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from llava_jax.data.records import Turn
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import Refused, UserError

IMAGE_MARK = "<image>"
# Sentinel of a picture's slots on the host (`IMAGE_TOKEN_INDEX` of the original); never reaches the device.
IMAGE_TOKEN = -200


class Span(NamedTuple):
    """A stretch of the prompt; `is_answer` marks what is trained on."""

    text: str
    is_answer: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """How turns become one text. `style` lays out the spans; the other fields are its words.

    `ends` closes a user's and an assistant's turn. Source: `llava/conversation.py` of the original.
    """

    name: str
    system: str
    roles: tuple[str, str]
    ends: tuple[str, str]
    style: Callable[["Template", Sequence[Turn]], list[Span]]

    def render(self, turns: Sequence[Turn], *, opened: bool = False) -> list[Span]:
        """Spans of the turns; `opened` adds the words after which the assistant begins to answer."""
        turns = [Turn(turn.role, move_image_first(turn.text)) for turn in turns]
        return self.style(self, [*turns, Turn("assistant", "")] if opened else turns)


def move_image_first(text: str) -> str:
    r"""Puts a turn's single picture on a line of its own in front (`preprocess_multimodal` of the original).

    Several pictures keep their places: interleaving carries meaning.

    Example:
        "Look at this <image> and count."   ->   "<image>\nLook at this  and count."
    """
    if text.count(IMAGE_MARK) != 1:
        return text
    return f"{IMAGE_MARK}\n{text.replace(IMAGE_MARK, '').strip()}".strip()


def dialogue(template: Template, turns: Sequence[Turn]) -> list[Span]:
    """`SeparatorStyle.TWO`: `system USER: question ASSISTANT: answer</s>USER: ...`; trained: answers with `</s>`."""
    spans = [Span(template.system + template.ends[0])]
    for turn in turns:
        speaker = turn.role == "assistant"
        role, end = template.roles[speaker], template.ends[speaker]
        if not turn.text:
            spans.append(Span(f"{role}:"))
        elif speaker:
            spans += [Span(f"{role}:"), Span(f" {turn.text}{end}", is_answer=True)]
        else:
            spans.append(Span(f"{role}: {turn.text}{end}"))
    return spans


def caption(template: Template, turns: Sequence[Turn]) -> list[Span]:
    r"""`SeparatorStyle.PLAIN`: `<image>caption\n`, whatever the user asked; trained: the caption and its newline."""
    if len(turns) != 2:
        raise Refused("malformed", f"the plain template needs one question and one answer; got {len(turns)} turns")
    question, answer = turns
    spans = [Span(IMAGE_MARK * question.text.count(IMAGE_MARK))]
    return spans if not answer.text else [*spans, Span(answer.text + template.ends[1], is_answer=True)]


V1 = Template(
    name="v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    roles=("USER", "ASSISTANT"),
    ends=(" ", "</s>"),
    style=dialogue,
)
PLAIN = Template(name="plain", system="", roles=("", ""), ends=("\n", "\n"), style=caption)

TEMPLATES = {template.name: template for template in (V1, PLAIN)}


def find_template(name: str) -> Template:
    """The template of that name; an unknown one is refused (the original falls back to v1 in silence)."""
    if name not in TEMPLATES:
        raise UserError(f"Unknown conversation template {name!r}; choose one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


class Tokenized(NamedTuple):
    """One sequence; a picture's slots hold `IMAGE_TOKEN`."""

    tokens: Int[np.ndarray, " t"]
    is_answer: Bool[np.ndarray, " t"]


def tokenize(spans: Sequence[Span], tokenizer: Tokenizer, image_slots: Sequence[int]) -> Tokenized:
    """Token ids of a rendered conversation, each `<image>` widened to the slots that its features take.

    Text between pictures is tokenized in one piece (`tokenizer_image_token` of the original), and a token is
    an answer's if it starts inside an answer span, so that no mask depends on re-tokenizing anything.

    Example, with 3 slots:
        "<image>\\nHi? Yes"   ->   [bos, -200, -200, -200, newline, Hi, ?, Yes]

    Raises:
      Refused: the number of marks differs from the number of pictures.
    """
    text = "".join(span.text for span in spans)
    edges = np.cumsum([0, *(len(span.text) for span in spans)])
    answers = np.array([span.is_answer for span in spans] + [False])
    chunks = text.split(IMAGE_MARK)
    if len(chunks) - 1 != len(image_slots):
        raise Refused(
            "image count", f"{len(chunks) - 1} {IMAGE_MARK} marks in the text for {len(image_slots)} pictures"
        )
    pieces = [np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)]
    masks = [np.zeros(len(pieces[0]), bool)]
    base = 0
    for i, chunk in enumerate(chunks):
        if i > 0:
            pieces.append(np.full(image_slots[i - 1], IMAGE_TOKEN, np.int32))
            masks.append(np.zeros(image_slots[i - 1], bool))
        ids, starts = tokenizer.encode(chunk)
        pieces.append(ids)
        masks.append(answers[np.searchsorted(edges, base + starts, side="right") - 1])
        base += len(chunk) + len(IMAGE_MARK)
    return Tokenized(np.concatenate(pieces), np.concatenate(masks))
