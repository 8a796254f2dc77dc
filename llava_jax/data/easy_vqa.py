"""The easy-vqa set (Zhou, 2019) in LLaVA's record format: pictures of one shape each, and questions about them."""

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


def picture_folder() -> Path:
    """The folder that picture names are relative to, inside the installed package."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("The quickstart needs the easy-vqa package; run `pip install 'llava_jax[quickstart]'`.")
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
            denies = " not " in question.text or question.text.startswith("is no ")
            if (question.answer == "yes") == denies:
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


def caption_records(split: Literal["train", "test"]) -> list[dict]:
    """One record a picture: `<image>`, and a caption made of what its questions tell."""
    records = []
    for picture, asked in by_picture(questions(split)).items():
        colour, shape = describe(asked)
        caption = f"a {colour} {shape or 'shape'}" if colour else f"a {shape or 'shape'}"
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": caption}]
        records.append({"id": picture, "image": picture_name(split, picture), "conversations": turns})
    return records


def conversation_records(split: Literal["train", "test"], *, orders: int, seed: int) -> list[dict]:
    """All questions of a picture as one conversation, `orders` times over in different order.

    The order matters: later answers can be read off earlier ones, so each question should come first at times.
    """
    rng = random.Random(seed)
    records = []
    for order in range(orders):
        for picture, asked in by_picture(questions(split)).items():
            turns = []
            for i, question in enumerate(rng.sample(asked, len(asked))):
                mark = "<image>\n" if i == 0 else ""
                turns.append({"from": "human", "value": mark + question.text})
                turns.append({"from": "gpt", "value": question.answer})
            image = picture_name(split, picture)
            records.append({"id": f"{picture}_{order}", "image": image, "conversations": turns})
    return records
