"""The easy-vqa set (Zhou, 2019) in LLaVA's record format: pictures of one shape each, and questions about them."""

import collections
import importlib.util
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from llava_jax.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")


class Question(NamedTuple):
    text: str
    answer: str
    picture: int

    @property
    def kind(self) -> Literal["shape", "colour", "yes/no"]:
        """What is asked for, by the answer's word."""
        return "shape" if self.answer in SHAPES else "colour" if self.answer in COLOURS else "yes/no"

    @property
    def is_negated(self) -> bool:
        return " not " in self.text or self.text.startswith("is no ")

    @property
    def is_shown(self) -> bool:
        """Whether a yes/no question's thing is in the picture."""
        return (self.answer == "yes") != self.is_negated


def picture_folder() -> Path:
    """The folder that picture names are relative to, inside the installed package."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("The quickstart needs the easy-vqa package; run pip install -e '.[quickstart]'.")
    return Path(spec.origin).parent / "data"


def picture_name(split: str, picture: int) -> str:
    return f"{split}/images/{picture}.png"


def questions(split: Literal["train", "test"]) -> list[Question]:
    """Every question of a split, in the package's order."""
    return [Question(*row) for row in json.loads((picture_folder() / split / "questions.json").read_text())]


def describe(asked: Iterable[Question]) -> tuple[str, str]:
    """Colour and shape of one picture, as far as its questions and answers tell; "" where they do not.

    Example:
        "what color is the shape?" blue; "is there a circle?" yes   ->   ("blue", "circle")
    """
    colour = shape = ""
    for question in asked:
        if question.kind == "yes/no":
            if not question.is_shown:
                continue
            words: Sequence[str] = question.text.rstrip("?").split()
        else:
            # "what is the blue shape?" rectangle, "what color is the circle?" blue: both are facts.
            words = [*question.text.rstrip("?").split(), question.answer]
        colour = next((word for word in words if word in COLOURS), colour)
        shape = next((word for word in words if word in SHAPES), shape)
    return colour, shape


def by_picture(asked: Iterable[Question]) -> dict[int, list[Question]]:
    grouped: dict[int, list[Question]] = {}
    for question in asked:
        grouped.setdefault(question.picture, []).append(question)
    return grouped


def make_caption(asked: Iterable[Question]) -> str:
    """What the questions of a picture tell of it, as a caption."""
    colour, shape = describe(asked)
    return " ".join(word for word in ("a", colour, shape or "shape") if word)


# What a caption answers; in no question of the set.
CAPTION_QUESTION = "what does the image show?"
# Of the questions of the reading stage.
CAPTION_SHARE = 0.1
# That stand in the place of a picture.
MOST_WORDS = 24


def caption_records(split: Literal["train", "test"]) -> list[dict]:
    """One record for each picture whose questions tell both colour and shape: the picture, and a caption."""
    records = []
    for picture, asked in _described(split).items():
        caption = make_caption(asked)
        turns = _turns("<image>", [Question(CAPTION_QUESTION, caption, picture)])
        records.append({"id": picture, "image": picture_name(split, picture), "conversations": turns})
    return records


def reading_records(split: Literal["train", "test"], *, count: int, seed: int) -> list[dict]:
    """Text alone, one question a record, with a caption's words in the picture's place, from easy to hard.

    The words come in any number and order, as patches show them: what reads them cannot go by their places. One
    question in ten asks for the caption, as stage 1 will. Negations come in bit by bit from the second third on.

    Example:
        blue circle circle a blue    "is there a red shape?" no    "what does the image show?" a blue circle
    """
    rng = random.Random(seed)
    known = _facts(_described(split))
    captions = sorted(known)
    records = []
    for number in range(count):
        caption = rng.choice(captions)
        words = caption.split()
        words += rng.choices(words, k=rng.randint(4, MOST_WORDS) - len(words))
        rng.shuffle(words)
        negations = 0.5 * min(1.0, max(0.0, 3 * number / count - 1))
        question = Question(CAPTION_QUESTION, caption, picture=-1)
        if rng.random() >= CAPTION_SHARE:
            question = _choose(rng, known[caption], negations)
        records.append({"id": number, "conversations": _turns(" ".join(words), [question])})
    return records


def question_records(split: Literal["train", "test"], *, count: int, seed: int) -> list[dict]:
    """Pictures, one question a record: first chosen to be told by the picture alone, in the last sixth as asked."""
    rng = random.Random(seed)
    groups, described = by_picture(questions(split)), _described(split)
    known = _facts(described)
    order: list[int] = []
    records = []
    for number in range(count):
        if number < count * 5 // 6:
            order = order or rng.sample(sorted(described), len(described))
            picture = order.pop()
            question = _choose(rng, known[make_caption(described[picture])], negations=0.5)
        else:
            picture = rng.choice(sorted(groups))
            question = rng.choice(groups[picture])
        image = picture_name(split, picture)
        records.append({"id": number, "image": image, "conversations": _turns("<image>", [question])})
    return records


def _described(split: Literal["train", "test"]) -> dict[int, list[Question]]:
    """The pictures whose questions tell both colour and shape."""
    return {picture: asked for picture, asked in by_picture(questions(split)).items() if "" not in describe(asked)}


def _facts(described: dict[int, list[Question]]) -> dict[str, list[Question]]:
    """By caption, every question that was asked of any picture of that caption, once."""
    known: dict[str, dict[str, Question]] = collections.defaultdict(dict)
    for asked in described.values():
        known[make_caption(asked)] |= {question.text: question for question in asked}
    return {caption: list(by_text.values()) for caption, by_text in known.items()}


def _choose(rng: random.Random, facts: Sequence[Question], negations: float) -> Question:
    """One question of a third of what-questions, yes and no equally often, `negations` of them negated.

    As the set has them, four of five yes/no questions can be answered from their words alone, and a small decoder
    stays there for thousands of steps.
    """
    is_negated, is_shown = rng.random() < negations, rng.random() < 0.5
    kind = rng.choice(("shape", "colour", "yes/no", "yes/no", "yes/no", "yes/no"))
    fitting = [
        question
        for question in facts
        if question.kind == kind
        and (kind != "yes/no" or (question.is_shown, question.is_negated) == (is_shown, is_negated))
    ]
    return rng.choice(fitting)


def _turns(shown: str, asked: Sequence[Question]) -> list[dict]:
    """Questions and answers in the original's format, what is shown in front of the first question."""
    turns = []
    for i, question in enumerate(asked):
        turns.append({"from": "human", "value": question.text if i else f"{shown}\n{question.text}"})
        turns.append({"from": "gpt", "value": question.answer})
    return turns
