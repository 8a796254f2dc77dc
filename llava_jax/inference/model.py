"""A model ready to answer: its parameters, and how text and pictures become its input."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from PIL import Image

from llava_jax.convert.card import read_card
from llava_jax.convert.folder import TOKENIZER, check_parameters, read_parameters
from llava_jax.data.conversation import IMAGE_MARK, Span, Template, find_template, tokenize
from llava_jax.data.images import ImageMode, cut_tiles, find_layout, open_image
from llava_jax.data.records import Turn
from llava_jax.data.rows import Example, make_example
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import CheckpointError, Refused, UserError
from llava_jax.models.build import structure
from llava_jax.models.parameters import Parameters
from llava_jax.shapes import LlavaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A LLaVA with its layers apart, as decoding wants them."""

    config: LlavaConfig
    graphdef: nnx.GraphDef
    params: Parameters


# One request on the host: what a record is in training.
Prompt = Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor:
    """Turns conversations and pictures into prompts as the model saw them in training."""

    tokenizer: Tokenizer
    template: Template | None
    image_mode: ImageMode
    image_size: int
    num_features: int

    def ask(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> Prompt:
        """The conversation so far, open for the assistant's next answer."""
        return self._encode(self._render(turns, images, opened=True), images)

    def answered(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> Prompt:
        """A conversation whose last turn is the assistant's, without the words that would close it."""
        *given, last = self._render(turns, images)
        answer = Span(last.text.removesuffix(self._known_template().ends[1]), last.is_answer)
        return self._encode([*(Span(span.text) for span in given), answer], images)

    def raw(self, text: str, images: Sequence[Image.Image], *, answer: str = "") -> Prompt:
        """The text as it stands, `<image>` marks included; the tokenizer's own opening is added."""
        return self._encode([Span(text), Span(answer, is_answer=True)], images)

    def _render(self, turns: Sequence[Turn], images: Sequence[Image.Image], *, opened: bool = False) -> list[Span]:
        try:
            return self._known_template().render(self._marked(turns, images), opened=opened)
        except Refused as refusal:
            raise UserError(f"{refusal.detail}. Choose another template.") from None

    def _known_template(self) -> Template:
        if self.template is None:
            raise UserError("This model does not say which conversation template it was trained with; give --conv.")
        return self.template

    def _marked(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> list[Turn]:
        """Pictures that the text does not place come before the first question."""
        if any(IMAGE_MARK in turn.text for turn in turns):
            return list(turns)
        first, *others = turns
        return [Turn(first.role, f"{IMAGE_MARK}\n" * len(images) + first.text), *others]

    def _encode(self, spans: Sequence[Span], images: Sequence[Image.Image]) -> Prompt:
        try:
            shape = {"image_size": self.image_size, "num_features": self.num_features}
            layouts = [find_layout(image.size, self.image_mode, **shape) for image in images]
            text = tokenize(spans, self.tokenizer, [layout.num_slots for layout in layouts])
            tiles = [cut_tiles(image, size=self.image_size, mode=self.image_mode) for image in images]
        except Refused as refusal:
            raise UserError(f"{refusal}. Give one --image per {IMAGE_MARK} mark, undamaged.") from None
        return make_example(text, tiles, layouts, self.image_size)


def load(path: str, *, template: str | None = None) -> tuple[Model, Processor]:
    """Opens a model folder or a training workdir (its newest step) for inference, in float32.

    `template` names a conversation template instead of the one that the folder names.

    Raises:
      CheckpointError: the folder holds no LLaVA model, or a damaged one; says what is wrong.
    """
    card = read_card(path)
    if not isinstance(card.model, LlavaConfig):
        raise CheckpointError(
            f"Only a LLaVA model can answer; {path!r} holds a {type(card.model).__name__[:-6]} model. "
            "Give the folder of a stage that trains on conversations."
        )
    graphdef, expected = structure(card.model)
    params = read_parameters(path)
    check_parameters(params, expected, path)
    model = Model(
        config=card.model,
        graphdef=graphdef,
        params={name: jnp.asarray(value, jnp.float32) for name, value in params.items()},
    )
    tokenizer = Tokenizer(str(Path(path, TOKENIZER)))
    if tokenizer.vocab_size > card.model.text.vocab_size:
        raise CheckpointError(
            f"Every token must have an embedding; the tokenizer of {path!r} has vocab_size={tokenizer.vocab_size}, "
            f"the model {card.model.text.vocab_size}. Put the model's own tokenizer there."
        )
    name = template if template is not None else card.template
    processor = Processor(
        tokenizer=tokenizer,
        template=None if name is None else find_template(name),
        image_mode=card.image_mode,
        image_size=card.model.vision.image_size,
        num_features=card.model.num_features,
    )
    return model, processor


def read_images(paths: Sequence[str]) -> list[Image.Image]:
    """Pictures named by a user.

    Raises:
      UserError: a file is missing, no picture, too large or damaged.
    """
    images = []
    for path in paths:
        try:
            image = open_image(path)
            image.load()
            images.append(image)
        except (Refused, OSError, ValueError, SyntaxError) as error:
            raise UserError(f"--image must name a readable picture; {path!r} is not: {error}.") from None
    return images
