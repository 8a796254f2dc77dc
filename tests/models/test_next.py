"""LLaVA-1.6 against transformers' LlavaNext: features, merged rows, logits, loss, gradients and greedy answers."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from llava_jax.convert.layouts import from_huggingface
from llava_jax.data.anyres import AnyRes
from llava_jax.data.conversation import IMAGE_TOKEN, Tokenized
from llava_jax.data.images import cut_tiles
from llava_jax.data.rows import Conversations, Example, Needs, make_example
from llava_jax.data.templates import V1
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.inference.generate import Sampling, generate, pad_prompts
from llava_jax.inference.model import Model, Processor
from llava_jax.inference.score import score
from llava_jax.models.attention import attend_xla, unconstrained
from llava_jax.models.build import structure
from llava_jax.models.parameters import GraphDef, bind, part
from llava_jax.train.objectives import Context, next_token
from tests.models import oracle
from tests.tiny import LLAVA, TEXT

VALUES = 1e-5
GRADIENTS = 1e-4
NEXT = dataclasses.replace(LLAVA, text=dataclasses.replace(TEXT, num_layers=2), image_newline=True)
TILE, PATCHES = NEXT.vision.image_size, NEXT.num_features
MODE = AnyRes(
    pinpoints=tuple((TILE * w, TILE * h) for w, h in ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))),
    merge="spatial_unpad",
    rounding="huggingface",
)
# Padding above and below, left and right, none; a picture that fills every tile, and one of hardly a pixel.
SIZES = ((40, 25), (13, 33), (64, 64), (90, 20), (2, 3))
# The pictures of each record, and how many tokens stand before, between and after them.
RECORDS = (((0, 3), (5, 2, 6)), ((1,), (1, 7)), ((2,), (2, 3)), ((4,), (0, 8)), ((), (9,)))


class Pair(NamedTuple):
    theirs: Any
    graphdef: GraphDef
    params: dict[str, jax.Array]


def _parameters(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Theirs under our names; the newline's own name is looked for where the versions put it."""
    (newline,) = (name for name in tensors if name.endswith("image_newline"))
    params = from_huggingface({name: value for name, value in tensors.items() if name != newline})
    return params | {"image_newline": tensors[newline]}


@pytest.fixture(scope="module")
def pair() -> Pair:
    plain = oracle.llava_config(NEXT)
    config = transformers.LlavaNextConfig(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_index=oracle.IMAGE_ID,
        image_grid_pinpoints=[[height, width] for width, height in MODE.pinpoints],
        vision_feature_layer=NEXT.select_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    theirs = oracle.make(transformers.LlavaNextForConditionalGeneration, config, seed=11)
    params = _parameters(oracle.state(theirs))
    graphdef, expected = structure(NEXT)
    assert {name: value.shape for name, value in params.items()} == {n: v.shape for n, v in expected.items()}
    return Pair(theirs, graphdef, {name: jnp.asarray(value) for name, value in params.items()})


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3)).astype(np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def examples(pictures: list[Image.Image]) -> list[Example]:
    rng = np.random.default_rng(4)
    made = []
    for numbers, pieces in RECORDS:
        layouts = [MODE.layout(pictures[i].size, TILE, PATCHES) for i in numbers]
        tokens: list[int] = [1]
        for place, piece in enumerate(pieces):
            tokens += rng.integers(3, oracle.IMAGE_ID, piece).tolist()
            tokens += [IMAGE_TOKEN] * (layouts[place].num_slots if place < len(layouts) else 0)
        # The words after the last picture are the answer, but for the first of them.
        is_answer = np.arange(len(tokens)) >= len(tokens) - pieces[-1] + 1
        tiles = [cut_tiles(pictures[i], size=TILE, mode=MODE) for i in numbers]
        made.append(make_example(Tokenized(np.array(tokens, np.int32), is_answer), tiles, layouts, TILE))
    return made


def _given(example: Example, numbers: tuple[int, ...]) -> dict[str, Any]:
    """One record as transformers' model takes it: tiles of each picture, padded to as many as the largest has."""
    ids = np.where(example.tokens == IMAGE_TOKEN, oracle.IMAGE_ID, example.tokens)
    given: dict[str, Any] = {"input_ids": torch.tensor(ids[None], dtype=torch.long)}
    if numbers:
        counts = [len(MODE.layout(SIZES[i], TILE, PATCHES).patches) for i in numbers]
        pixels = torch.zeros(len(numbers), max(counts), 3, TILE, TILE)
        for row, tiles in enumerate(torch.split(oracle.pixels(example.images), counts)):
            pixels[row, : len(tiles)] = tiles
        given |= {"pixel_values": pixels, "image_sizes": torch.tensor([SIZES[i][::-1] for i in numbers])}
    return given


@pytest.fixture(scope="module")
def given(examples: list[Example]) -> list[dict[str, Any]]:
    return [_given(example, numbers) for example, (numbers, _) in zip(examples, RECORDS, strict=True)]


def test_features_merged_rows_and_logits_are_the_references(pair: Pair, examples: list[Example], given: list[dict]):
    @jax.jit
    def run(params, inputs):
        model = bind(pair.graphdef, params)
        b, i = inputs.images.shape[:2]
        flat = inputs.images.reshape(b * i, *inputs.images.shape[2:])
        features = model.projector(model.tower.features(flat, depth=NEXT.tower_depth, select="patch"))
        x = model.embed(inputs.tokens, inputs.images, inputs.patch_slots, inputs.is_newline)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        hidden = model.decoder(x, positions)
        return features.reshape(b, i, *features.shape[1:]), x, hidden @ model.decoder.head()

    # Every record at once: pictures of all sizes, and none, in one padded batch.
    features, merged, logits = run(pair.params, pad_prompts(examples))
    seen: dict[str, Any] = {}
    language, projector = pair.theirs.model.language_model, pair.theirs.model.multi_modal_projector
    hooks = [
        language.register_forward_pre_hook(
            lambda _, __, kwargs: seen.update(x=kwargs["inputs_embeds"]), with_kwargs=True
        ),
        projector.register_forward_hook(lambda _, __, out: seen.update(features=out)),
    ]
    for row, (example, inputs) in enumerate(zip(examples, given, strict=True)):
        with torch.no_grad():
            wanted = pair.theirs(**inputs).logits[0].numpy()
        length, tiles = len(example.tokens), len(example.images)
        if tiles:
            assert oracle.error(features[row, :tiles], seen["features"].numpy()) <= VALUES
        assert oracle.error(merged[row, :length], seen["x"][0].numpy()) <= VALUES
        assert oracle.error(logits[row, :length], wanted) <= VALUES
    for hook in hooks:
        hook.remove()


def test_the_loss_and_every_gradient_of_packed_rows_are_the_references(
    pair: Pair, examples: list[Example], given: list[dict]
):
    """All parts train, tower and newline included; several records share a row."""
    pair.theirs.zero_grad()
    weight = sum(int(example.is_answer.sum()) for example in examples)
    total = torch.zeros(())
    for example, inputs in zip(examples, given, strict=True):
        labels = np.where(example.is_answer, example.tokens, -100)
        logits = pair.theirs(**inputs).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.tensor(labels[1:], dtype=torch.long), reduction="sum"
        )
    (total / weight).backward()
    gradients = {name: value.grad.numpy() for name, value in pair.theirs.named_parameters() if value.grad is not None}
    wanted = _parameters(gradients)

    rows = Conversations(template=V1, length=400, tiles=16, image_mode=MODE)
    needs = Needs(None, ".", TILE, PATCHES)
    packed = [rows.assemble(share, needs) for share in ([examples[0], examples[4], examples[2]], examples[1::2])]
    batch = {name: jnp.asarray(np.stack([row[name] for row in packed])) for name in packed[0]}

    @jax.jit
    def run(params, batch):
        def mean(params):
            # As `remat="everything"` runs it: the tower's layers are computed again too.
            sums = next_token(bind(pair.graphdef, params), batch, Context(attend_xla, unconstrained, jax.checkpoint))
            return sums.loss / sums.weight, sums.weight

        return jax.value_and_grad(mean, has_aux=True)(params)

    (loss, found_weight), found = run(pair.params, batch)
    assert found_weight == weight
    assert oracle.error(loss, (total / weight).detach().numpy()) <= VALUES
    assert {part(name) for name in wanted} == {"tower", "projector", "decoder", "image_newline"}
    for name, value in found.items():
        if name.endswith("k_proj.bias") and name in wanted:
            assert np.abs(value).max() <= GRADIENTS * np.abs(found[name.replace("k_proj", "q_proj")]).max()
        elif name in wanted:
            assert np.abs(wanted[name]).max() > 0, name
            assert oracle.error(value, wanted[name]) <= GRADIENTS, name
        else:
            assert name.startswith(("tower.layers.2.", "tower.post_layernorm."))
            assert not np.asarray(value).any()


def test_greedy_answers_and_scores_of_one_batch_are_the_references(
    pair: Pair, examples: list[Example], given: list[dict], data: Path
):
    model = Model(config=NEXT, graphdef=pair.graphdef, params=pair.params)
    processor = Processor(
        tokenizer=open_tokenizer(str(data / "tokenizer")),
        template=None,
        image_mode=MODE,
        image_size=TILE,
        num_features=PATCHES,
    )
    answers = generate(model, processor, examples, Sampling(max_new_tokens=6))
    scores = score(model, examples)
    for example, inputs, answer, scored in zip(examples, given, answers, scores, strict=True):
        with torch.no_grad():
            out = pair.theirs.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                do_sample=False,
                max_new_tokens=6,
                eos_token_id=2,
                pad_token_id=2,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logprobs = torch.log_softmax(pair.theirs(**inputs).logits[0], dim=-1).numpy()
        best = torch.stack(out.logits).topk(2, dim=-1).values
        assert (best[..., 0] - best[..., 1]).min() > 1e-4, "a draw decides nothing; take another seed"
        assert answer.token_ids == [int(i) for i in out.sequences[0, len(example.tokens) :] if i != 2]
        wanted = [logprobs[i - 1, example.tokens[i]] for i in np.flatnonzero(example.is_answer)]
        assert oracle.error(scored.logprobs, wanted) <= VALUES


def test_a_processor_lays_pictures_of_any_size_into_its_prompts(pictures: list[Image.Image], data: Path):
    processor = Processor(
        tokenizer=open_tokenizer(str(data / "tokenizer")),
        template=None,
        image_mode=MODE,
        image_size=TILE,
        num_features=PATCHES,
    )
    prompt = processor.raw("<image>\nand <image> differ", [pictures[0], pictures[2]])
    layouts = [MODE.layout(pictures[i].size, TILE, PATCHES) for i in (0, 2)]
    assert (prompt.tokens == IMAGE_TOKEN).sum() == sum(layout.num_slots for layout in layouts)
    assert len(prompt.images) == len(prompt.patch_slots) == sum(len(layout.patches) for layout in layouts)
    landed = np.append(prompt.patch_slots[prompt.patch_slots >= 0], np.flatnonzero(prompt.is_newline))
    np.testing.assert_array_equal(np.sort(landed), np.flatnonzero(prompt.tokens == IMAGE_TOKEN))
