"""One step: accumulation, frozen parts, non-finite batches, half precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.data.records import RecordFile, find_spans
from llava_jax.data.rows import Conversations, Needs
from llava_jax.data.templates import V1
from llava_jax.models.attention import attend_xla, unconstrained
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.parameters import bind, part
from llava_jax.train.config import OptimConfig
from llava_jax.train.objectives import Context, Sums, next_token
from llava_jax.train.optim import make_optimizer
from llava_jax.train.step import cast, make_step
from tests.tiny import LLAVA as TINY

# One layer that matters in each network: compiling is most of what these tests cost.
LLAVA = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, num_layers=2),
    text=dataclasses.replace(TINY.text, num_layers=1),
)

CONTEXT = Context(attend=attend_xla, constrain=unconstrained, remat=None)
TRAINED = ("projector", "decoder")
OPTIMIZER = make_optimizer(OptimConfig(learning_rate=1e-2, warmup_ratio=0.0, weight_decay=0.1), 10)


def _spoilt(model, batch, context) -> Sums:
    """`next_token` whose loss and gradient a batch can spoil."""
    sums = next_token(model, batch, context)
    return sums._replace(loss=sums.loss * batch["factor"][0])


def _values() -> dict:
    return random_parameters(LLAVA, ("tower", "projector", "decoder"), seed=0)


@functools.cache
def _start() -> tuple[dict, dict]:
    values = _values()
    trainable = {name: jnp.asarray(value) for name, value in values.items() if part(name) in TRAINED}
    return trainable, {name: jnp.asarray(value) for name, value in values.items() if name not in trainable}


@functools.cache
def _step(accumulation: int = 1, compute_dtype: str = "float32"):
    step = make_step(
        structure(LLAVA)[0],
        _spoilt,
        OPTIMIZER,
        context=CONTEXT,
        accumulation=accumulation,
        compute_dtype=compute_dtype,
    )
    return jax.jit(step)


@pytest.fixture(scope="module")
def batch(data, needs: Needs) -> dict[str, jax.Array]:
    """Four rows that hold 2, 1, 1 and 0 records: very unequal numbers of targets."""
    records = RecordFile(str(data / "records.json"), find_spans(str(data / "records.json")))
    rows = Conversations(template=V1, length=400, tiles=4)
    loaded = [rows.load(records[i], needs, np.random.default_rng(0)) for i in (0, 1, 3, 4)]
    made = [rows.assemble(examples, needs) for examples in (loaded[:2], loaded[2:3], loaded[3:], [])]
    stacked = {name: jnp.asarray(np.stack([row[name] for row in made])) for name in made[0]}
    return stacked | {"factor": jnp.ones(4)}


def _run(batch, *, steps: int = 1, **settings):
    trainable, frozen = _start()
    state = OPTIMIZER.init(trainable)
    history = []
    for _ in range(steps):
        trainable, state, metrics = _step(**settings)(trainable, frozen, state, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return trainable, state, history


def test_the_loss_is_a_mean_over_targets_and_falls(batch):
    _, _, history = _run(batch, steps=4)
    assert history[0]["weight"] == float(batch["is_target"].sum()) > 0
    assert history[0]["tokens"] == float((batch["segment_ids"] > 0).sum())
    assert abs(history[0]["loss"] - np.log(LLAVA.text.vocab_size)) < 0.5
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(metrics["finite"] for metrics in history)


@pytest.mark.parametrize("accumulation", [pytest.param(2, marks=pytest.mark.nightly), 4])
def test_accumulation_changes_no_number(batch, accumulation: int):
    _, _, (one,) = _run(batch)
    _, _, (several,) = _run(batch, accumulation=accumulation)
    assert one["weight"] == several["weight"]
    assert one["correct"] == several["correct"]
    np.testing.assert_allclose(several["loss"], one["loss"], rtol=1e-6)
    np.testing.assert_allclose(several["grad_norm"], one["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_micro_batches_that_hold_nothing_are_skipped(batch, accumulation: int):
    """Rows 2 and 3 are the last micro-batch of two, the last two of four; computed, their factor would spoil it."""
    order = {2: jnp.array([0, 2, 1, 3]), 4: jnp.arange(4)}[accumulation]
    rows = {name: value.at[2:].set(0) for name, value in batch.items()}
    _, _, (expected,) = _run(rows | {"factor": jnp.ones(4)})
    spoilt = {name: value[order] for name, value in (rows | {"factor": jnp.array([1, 1, jnp.nan, jnp.nan])}).items()}
    _, _, (found,) = _run(spoilt, accumulation=accumulation)
    assert found["computed"] == 0.5
    assert found["finite"]
    assert expected["computed"] == 1
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-5)


def _gradients(batch, accumulation: int) -> dict[str, jax.Array]:
    """What the optimizer is given, by an optimizer that hands it out."""
    keep = optax.GradientTransformation(lambda p: p, lambda g, s, p: (jax.tree.map(jnp.zeros_like, g), g))
    trainable, frozen = _start()
    step = make_step(
        structure(LLAVA)[0],
        next_token,
        keep,
        context=CONTEXT,
        accumulation=accumulation,
        compute_dtype="float32",
    )
    return jax.jit(step)(trainable, frozen, trainable, batch)[1]


def test_accumulated_gradients_are_those_of_the_whole_batch(batch):
    whole, split = _gradients(batch, 1), _gradients(batch, 4)
    largest = max(float(jnp.abs(value).max()) for value in whole.values())
    for name, value in whole.items():
        np.testing.assert_allclose(split[name], value, rtol=0, atol=1e-6 * max(1.0, largest), err_msg=name)


def test_a_batch_without_targets_has_no_gradient(batch):
    empty = batch | {"is_target": jnp.zeros_like(batch["is_target"])}
    _, state, (metrics,) = _run(empty)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["weight"] == 0
    assert metrics["finite"]
    for moments in jax.tree.leaves(next(s for s in state if isinstance(s, optax.ScaleByAdamState)).mu):
        assert not moments.any()


def test_only_trainable_parts_have_moments_and_change(batch):
    trainable, frozen = _start()
    after, state, _ = _run(batch, steps=2)
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    assert adam.mu.keys() == adam.nu.keys() == after.keys() == trainable.keys()
    assert {part(name) for name in frozen} == {"tower"}
    assert not frozen.keys() & adam.mu.keys()
    assert all((after[name] != value).any() for name, value in trainable.items())


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf, 3e38])
def test_a_batch_that_is_not_finite_changes_nothing(batch, factor: float):
    trainable, frozen = _start()
    step = _step()
    trainable, state, metrics = step(trainable, frozen, OPTIMIZER.init(trainable), batch)
    assert metrics["finite"]
    kept, kept_state, metrics = step(trainable, frozen, state, batch | {"factor": jnp.full(4, factor)})
    assert not metrics["finite"]
    for before, after in zip(jax.tree.leaves((trainable, state)), jax.tree.leaves((kept, kept_state)), strict=True):
        np.testing.assert_array_equal(before, after)


def test_bfloat16_computes_near_float32_and_keeps_float32_masters(batch):
    _, _, (exact,) = _run(batch)
    trainable, state, (half,) = _run(batch, compute_dtype="bfloat16")
    assert {value.dtype for value in trainable.values()} == {jnp.dtype("float32")}
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    assert {value.dtype for value in (*adam.mu.values(), *adam.nu.values())} == {jnp.dtype("float32")}
    assert half["finite"]
    assert abs(half["loss"] - exact["loss"]) < 0.02
    assert abs(half["grad_norm"] / exact["grad_norm"] - 1) < 0.05


def test_sums_over_thousands_of_tokens_are_not_added_up_in_bfloat16():
    """A sum of ones in bfloat16 stops at 256: the gradients of a token's vector, and of what all tokens share."""
    config = dataclasses.replace(LLAVA, image_newline=True)
    model, width, count = structure(config)[0], LLAVA.text.embed_dim, 2048
    names = ("decoder.embed_tokens.embedding", "decoder.norm.scale", "projector.linear.1.bias", "image_newline")
    random = random_parameters(config, ("tower", "projector", "decoder", "image_newline"), seed=0)
    values = cast({name: jnp.asarray(value) for name, value in random.items()}, jnp.bfloat16)

    def total(some):
        llava = bind(model, values | some)
        ids = jnp.full((1, count), 7)
        normed = llava.decoder.norm(jnp.ones((1, count, width), jnp.bfloat16))
        projected = llava.projector(jnp.ones((1, count, LLAVA.vision.embed_dim), jnp.bfloat16))
        embedded = llava.decoder.embed_tokens(ids)
        images = jnp.zeros((1, 1, 16, 16, 3), jnp.uint8)
        nowhere = count + jnp.arange(config.num_features)[None, None]
        newlines = llava.embed(ids, images, nowhere, jnp.ones((1, count), bool))
        shown = (normed, projected, embedded, newlines)
        assert {x.dtype for x in shown} == {jnp.dtype("bfloat16")}
        return sum(x.astype(jnp.float32).sum() for x in shown)

    found = jax.grad(total)({name: values[name] for name in names})
    for name, gradient in found.items():
        used = gradient[7] if name.endswith("embedding") else gradient
        np.testing.assert_allclose(used.astype(jnp.float32), count, rtol=0.01, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_multiplied_in_float32(batch, dtype: str):
    """Else GPUs round the operands to TensorFloat-32, and TPUs to bfloat16; backward passes included."""
    trainable, frozen = _start()
    jaxpr = jax.make_jaxpr(_step(compute_dtype=dtype))(trainable, frozen, OPTIMIZER.init(trainable), batch)
    text = str(jaxpr)
    highest = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert highest == (text.count("= dot_general[") if dtype == "float32" else 0)
