"""A tiny LLaVA with random weights, one that says what it is told, and a processor for both."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data.templates import V1
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.inference.model import Model, Processor, hold
from llava_jax.models.build import random_parameters
from tests.tiny import LLAVA

# Four features a picture, two layers each: compiling is what these tests wait for.
SMALL = dataclasses.replace(
    LLAVA,
    vision=dataclasses.replace(LLAVA.vision, image_size=8, num_layers=2),
    text=dataclasses.replace(LLAVA.text, num_layers=2),
)


@pytest.fixture(scope="session")
def values() -> dict[str, np.ndarray]:
    values = random_parameters(SMALL, {"tower", "projector", "decoder"}, seed=0)
    # The customary starting values repeat one token for ever; larger ones give answers that vary.
    values["decoder.embed_tokens.embedding"] *= 20
    values["decoder.lm_head.kernel"] *= 20
    return values


@pytest.fixture(scope="session")
def model(values: dict[str, np.ndarray]) -> Model:
    return hold(SMALL, values)


@pytest.fixture(scope="session")
def processor(data: Path) -> Processor:
    return Processor(
        tokenizer=open_tokenizer(str(data / "tokenizer")),
        template=V1,
        image_mode="square",
        image_size=SMALL.vision.image_size,
        num_features=SMALL.num_features,
    )


@pytest.fixture(scope="session")
def says(values: dict[str, np.ndarray], processor: Processor) -> Callable[[str], Model]:
    """A model that answers any prompt with the text (whose tokens must differ) and then EOS.

    Attention and MLP add nothing, so that the next token depends on the last one alone: token j of the text has
    the j-th unit vector as its embedding, and the head maps that vector to token j + 1.
    """

    def make(text: str) -> Model:
        ids = processor.tokenizer.encode(text).ids.tolist()
        assert len(set(ids)) == len(ids) < SMALL.text.embed_dim, "each token may come once"
        told = {name: np.array(value) for name, value in values.items()}
        for name in told:
            if name.endswith(("o_proj.kernel", "down_proj.kernel")) and name.startswith("decoder."):
                told[name][...] = 0
        embedding, head = told["decoder.embed_tokens.embedding"], told["decoder.lm_head.kernel"]
        embedding[...], head[...] = 0, 0
        embedding[:, -1] = 1
        for j, (token, following) in enumerate(zip([None, *ids], [*ids, processor.tokenizer.eos_id], strict=True)):
            if token is not None:
                embedding[token] = np.eye(SMALL.text.embed_dim)[j - 1]
            head[j - 1, following] = 10
        return hold(SMALL, told)

    return make
