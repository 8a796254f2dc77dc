"""A model ready to answer: its parameters, and how text and pictures become its input."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image

from llava_jax.convert.arrays import place_all
from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.folder import check_parameters
from llava_jax.data.conversation import IM_END, IM_START, IMAGE_MARK, Span, Template, marked, tokenize
from llava_jax.data.images import ImageMode, cut_tiles, find_layout, open_image
from llava_jax.data.records import Turn, require_unicode
from llava_jax.data.rows import Example, make_example
from llava_jax.data.templates import find_template
from llava_jax.data.tokenizer import Tokenizer, open_tokenizer
from llava_jax.errors import CheckpointError, Refused, UserError
from llava_jax.inference.stopping import Keywords
from llava_jax.models.build import structure
from llava_jax.models.parameters import GraphDef, Parameters
from llava_jax.models.quantized import Scheme, is_quantized
from llava_jax.shapes import LlavaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A LLaVA with its layers apart, as decoding wants them."""

    config: LlavaConfig
    graphdef: GraphDef
    params: Parameters

    @property
    def dtype(self) -> jnp.dtype:
        """What it computes in."""
        return self.params["decoder.norm.scale"].dtype


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

    @property
    def keywords(self) -> Keywords:
        """What closes an answer in the template, where that is more than the token which ends every text."""
        end = "" if self.template is None else self.template.ends[1]
        is_token = not end or self.tokenizer.token_id(end) == self.tokenizer.eos_id
        return Keywords(() if is_token else (end,), self.tokenizer)

    def ask(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> Prompt:
        """The conversation so far, open for the assistant's next answer."""
        return self._encode(self._render(turns, images, opened=True), images)

    def answered(self, turns: Sequence[Turn], images: Sequence[Image.Image]) -> Prompt:
        """A conversation whose last turn is the assistant's, without the words that would close it."""
        *given, last = self._render(turns, images)
        text = last.text.removesuffix(self._known_template().ends[1])
        # `[INST]` templates also write a space between the answer and what closes it.
        answer = Span(text[: text.rindex(turns[-1].text) + len(turns[-1].text)], last.is_answer)
        return self._encode([*(span._replace(is_answer=False) for span in given), answer], images)

    def raw(self, text: str, images: Sequence[Image.Image], *, answer: str = "") -> Prompt:
        """The text as it stands, `<image>` marks included; the tokenizer's own opening is added."""
        return self._encode([*marked(text), Span(answer, is_answer=True)], images)

    def _render(self, turns: Sequence[Turn], images: Sequence[Image.Image], *, opened: bool = False) -> list[Span]:
        template = self._known_template()
        is_placed = any(IMAGE_MARK in turn.text for turn in turns if turn.role == "user")
        try:
            return template.render(template.arrange(turns, unplaced=0 if is_placed else len(images)), opened=opened)
        except Refused as refusal:
            raise UserError(f"{refusal.detail}. Choose another template.") from None

    def _known_template(self) -> Template:
        if self.template is None:
            raise UserError("This model does not say which conversation template it was trained with; give --conv.")
        return self.template

    def _encode(self, spans: Sequence[Span], images: Sequence[Image.Image]) -> Prompt:
        try:
            for span in spans:
                require_unicode(span.text)
        except Refused as refusal:
            raise UserError(f"{refusal.detail}. Write it in UTF-8.") from None
        try:
            shape = {"image_size": self.image_size, "num_features": self.num_features}
            layouts = [find_layout(image.size, self.image_mode, **shape) for image in images]
            text = tokenize(spans, self.tokenizer, [layout.num_slots for layout in layouts])
            tiles = [cut_tiles(image, size=self.image_size, mode=self.image_mode) for image in images]
        except Refused as refusal:
            raise UserError(f"{refusal}. Give one --image per {IMAGE_MARK} mark, undamaged.") from None
        return make_example(text, tiles, layouts, self.image_size)


def load(
    path: str,
    *,
    template: str | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    quantize: Scheme | None = None,
) -> tuple[Model, Processor]:
    """Opens a model for inference: a model folder, a training workdir (newest step), or a folder or hub name of a
    Hugging Face or original LLaVA.

    `template` names a conversation template instead of the one that the checkpoint names; `dtype` is what the
    parameters are held in; `quantize` holds the decoder's linear layers in 8 or 4 bits instead.

    Raises:
      CheckpointError: there is no LLaVA model, or a damaged one; says what is wrong.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.model
    if not isinstance(config, LlavaConfig) or checkpoint.image_mode is None:
        raise CheckpointError(
            f"Only a LLaVA model can answer; {path!r} holds a {type(config).__name__[:-6]} model. "
            "Give the folder of a stage that trains on conversations."
        )
    if checkpoint.tokenizer is None:
        raise CheckpointError(
            f"A model's folder must hold tokenizer.json or tokenizer.model; {path!r} does not. Copy them there."
        )
    try:
        tokenizer = open_tokenizer(str(checkpoint.tokenizer), checkpoint.added_tokens)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    if tokenizer.vocab_size > config.text.vocab_size:
        raise CheckpointError(
            f"Every token must have an embedding; the tokenizer of {path!r} has vocab_size={tokenizer.vocab_size}, "
            f"the model {config.text.vocab_size}. Put the model's own tokenizer there."
        )
    if checkpoint.mm_use_im_start_end and None in map(tokenizer.token_id, (IM_START, IM_END)):
        raise CheckpointError(
            f"Every picture stands between the tokens {IM_START} and {IM_END}; the tokenizer of {path!r} does not have "
            "both. Put the model's own tokenizer there."
        )
    name = template if template is not None else checkpoint.template
    known = None if name is None else find_template(name)
    if known is not None and checkpoint.mm_use_im_start_end:
        known = known.framed()
    processor = Processor(
        tokenizer=tokenizer,
        template=known,
        image_mode=checkpoint.image_mode,
        image_size=config.vision.image_size,
        num_features=config.num_features,
    )
    check_parameters(checkpoint.params, structure(config)[1], path)
    return hold(config, checkpoint.params, dtype=dtype, quantize=quantize), processor


def hold(
    config: LlavaConfig,
    values: Mapping[str, Any],
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    quantize: Scheme | None = None,
) -> Model:
    """The model of these parameters, layers apart, on this process' first device and as that decodes fastest."""
    device = jax.local_devices()[0]
    graphdef, held = structure(config, quantize=quantize, streamed=device.platform == "cpu")
    here = jax.sharding.SingleDeviceSharding(device)
    targets = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype if is_quantized(name) else dtype, sharding=here)
        for name, value in held.items()
    }
    return Model(config=config, graphdef=graphdef, params=place_all(values, targets))


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
        # Whatever Pillow's code meets in damaged bytes, see `_to_rgb` of data/images.py.
        except Exception as error:
            raise UserError(f"--image must name a readable picture; {path!r} is not: {error}.") from None
    return images
