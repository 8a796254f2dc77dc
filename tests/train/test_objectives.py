"""Losses against torch and transformers; packing, padding and chunks change no sum."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.data.records import RecordFile, find_spans
from llava_jax.data.rows import Conversations, Needs
from llava_jax.data.templates import V1
from llava_jax.models.attention import attend_xla, unconstrained
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.parameters import bind
from llava_jax.train import cross_entropy as module
from llava_jax.train.cross_entropy import cross_entropy
from llava_jax.train.objectives import Context, contrastive, next_token
from tests.tiny import CLIP as TINY_CLIP
from tests.tiny import LLAVA as TINY_LLAVA

# One layer that matters in each network: compiling is most of what these tests cost.
LLAVA = dataclasses.replace(
    TINY_LLAVA,
    vision=dataclasses.replace(TINY_LLAVA.vision, num_layers=2),
    text=dataclasses.replace(TINY_LLAVA.text, num_layers=1),
)
CLIP = dataclasses.replace(
    TINY_CLIP,
    vision=dataclasses.replace(TINY_CLIP.vision, num_layers=1),
    caption=dataclasses.replace(TINY_CLIP.caption, num_layers=1),
)

CONTEXT = Context(attend=attend_xla, constrain=unconstrained, remat=None)


@functools.cache
def _structure(config) -> tuple:
    graphdef, abstract = structure(config)
    parts = {name.partition(".")[0] for name in abstract}
    return graphdef, {name: jnp.asarray(value) for name, value in random_parameters(config, parts, seed=0).items()}


def _model(config) -> tuple:
    graphdef, values = _structure(config)
    return graphdef, dict(values)


@functools.partial(jax.jit, static_argnums=0)
def _contrastive(graphdef, values, batch):
    """Sums and gradients."""

    def loss(values):
        sums = contrastive(bind(graphdef, values), batch, CONTEXT)
        return sums.loss, sums

    (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(values)
    return sums, gradients


def _problem(t: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(3, t, 8)).astype(np.float32)
    head = rng.normal(size=(8, 17)).astype(np.float32)
    targets = rng.integers(0, 17, (3, t)).astype(np.int32)
    return hidden, head, targets, rng.random((3, t)) < 0.4


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 11, 512])
def test_cross_entropy_is_that_of_torch_whatever_the_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch):
    import torch

    monkeypatch.setattr(module, "chunk_length", lambda t: min(t, chunk))
    hidden, head, targets, is_target = _problem(10)

    def loss(hidden, head):
        return cross_entropy(hidden, head, jnp.asarray(targets), jnp.asarray(is_target))

    (value, correct), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        jnp.asarray(hidden), jnp.asarray(head)
    )
    torch_hidden, torch_head = torch.tensor(hidden, requires_grad=True), torch.tensor(head, requires_grad=True)
    logits = torch_hidden @ torch_head
    labels = torch.where(torch.tensor(is_target), torch.tensor(targets).long(), -100)
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, 17), labels.reshape(-1), reduction="sum")
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    for ours, theirs in zip(gradients, (torch_hidden.grad, torch_head.grad), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    right = (logits.detach().numpy().argmax(-1) == targets) & is_target
    assert int(correct) == right.sum()


def test_nothing_supervised_is_no_loss_and_no_gradient():
    hidden, head, targets, is_target = map(jnp.asarray, _problem(7))
    value, gradient = jax.value_and_grad(lambda h: cross_entropy(h, head, targets, is_target & False)[0])(hidden)
    assert value == 0
    assert not gradient.any()


def test_an_unsupervised_target_does_not_matter():
    hidden, head, targets, is_target = _problem(9)
    first = cross_entropy(*map(jnp.asarray, (hidden, head, targets, is_target)))
    other = np.where(is_target, targets, 3)
    second = cross_entropy(*map(jnp.asarray, (hidden, head, other, is_target)))
    np.testing.assert_array_equal(first, second)


def test_packed_and_unpadded_records_have_the_same_loss_and_gradients(data, needs: Needs):
    records = RecordFile(str(data / "records.json"), find_spans(str(data / "records.json")))
    graphdef, values = _model(LLAVA)

    def sums(values, batch):
        return next_token(bind(graphdef, values), batch, CONTEXT)

    run = jax.jit(jax.value_and_grad(lambda values, batch: (lambda s: (s.loss, s))(sums(values, batch)), has_aux=True))
    loading = Conversations(template=V1, length=2048, tiles=4)
    examples = [loading.load(records[i], needs, np.random.default_rng(0)) for i in (0, 3, 4, 6)]
    longest = max(len(example.tokens) for example in examples)
    alone_loss = alone_weight = alone_tokens = 0.0
    alone_gradients = None
    for example in examples:
        rows = Conversations(template=V1, length=longest, tiles=2)
        batch = {name: jnp.asarray(value)[None] for name, value in rows.assemble([example], needs).items()}
        (_, one), gradients = run(values, batch)
        alone_loss, alone_weight = alone_loss + one.loss, alone_weight + one.weight
        alone_tokens += one.counts["tokens"]
        alone_gradients = gradients if alone_gradients is None else jax.tree.map(jnp.add, alone_gradients, gradients)
    length = sum(len(example.tokens) for example in examples) + 13
    rows = Conversations(template=V1, length=length, tiles=6)
    batch = {name: jnp.asarray(value)[None] for name, value in rows.assemble(examples, needs).items()}
    (_, packed), gradients = run(values, batch)
    assert packed.weight == alone_weight
    assert packed.counts["tokens"] == alone_tokens == length - 13
    np.testing.assert_allclose(packed.loss, alone_loss, rtol=1e-5)
    largest = max(float(jnp.abs(gradient).max()) for gradient in alone_gradients.values())
    for name, gradient in gradients.items():
        # Some gradients are zero but for rounding, such as those of key biases.
        scale = max(float(jnp.abs(alone_gradients[name]).max()), 1e-4 * largest)
        np.testing.assert_allclose(gradient / scale, alone_gradients[name] / scale, atol=1e-4, err_msg=name)


def _pairs(number: int, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 98, (number, 12)).astype(np.int32)
    tokens[:, 8:] = CLIP.caption.eos_id
    images = rng.integers(0, 256, (number, 16, 16, 3)).astype(np.uint8)
    return {"tokens": jnp.asarray(tokens), "images": jnp.asarray(images), "is_pair": jnp.ones(number, bool)}


def test_the_contrastive_loss_is_that_of_transformers():
    import torch
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss as reference

    graphdef, values = _model(CLIP)
    values["logit_scale"] = jnp.asarray(3.0)
    batch = _pairs(6)
    sums, _ = _contrastive(graphdef, values, batch)
    image, text = jax.jit(lambda values: bind(graphdef, values)(batch["images"], batch["tokens"]))(values)
    logits = np.exp(3.0) * np.asarray(text) @ np.asarray(image).T
    assert sums.weight == 6
    np.testing.assert_allclose(sums.loss / sums.weight, reference(torch.tensor(logits)).item(), rtol=1e-5)


def test_rows_that_are_no_pairs_change_nothing():
    graphdef, values = _model(CLIP)
    batch = _pairs(6)
    padded = {name: jnp.concatenate([value, value[:2]]) for name, value in batch.items()}
    padded["is_pair"] = jnp.arange(8) < 6
    padded["images"] = padded["images"].at[6:].set(0)
    plain, expected = _contrastive(graphdef, values, batch)
    sums, gradients = _contrastive(graphdef, values, padded)
    np.testing.assert_allclose(sums.loss, plain.loss, rtol=1e-6)
    assert sums.weight == 6
    assert sums.counts["tokens"] == 6
    assert sums.counts["correct"] == plain.counts["correct"]
    for name, gradient in gradients.items():
        assert jnp.isfinite(gradient).all(), name
        np.testing.assert_allclose(gradient, expected[name], atol=1e-5, err_msg=name)


def test_no_pair_at_all_is_no_loss_and_no_gradient():
    graphdef, values = _model(CLIP)
    batch = _pairs(6) | {"is_pair": jnp.zeros(6, bool)}
    sums, gradients = _contrastive(graphdef, values, batch)
    assert sums.loss == 0
    assert sums.weight == 0
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient), err_msg=name)


def test_the_temperature_stops_at_a_hundred():
    graphdef, values = _model(CLIP)
    losses = [
        _contrastive(graphdef, values | {"logit_scale": jnp.asarray(scale)}, _pairs(6))[0].loss
        for scale in (np.log(100.0).astype(np.float32), np.float32(50.0))
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_repeated_caption_is_a_right_answer_for_each_of_its_pictures():
    graphdef, values = _model(CLIP)
    batch = _pairs(6)
    batch["tokens"] = jnp.broadcast_to(batch["tokens"][:1], batch["tokens"].shape)
    assert _contrastive(graphdef, values, batch)[0].counts["correct"] == 6
