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
from llava_jax.models.parameters import part
from llava_jax.train.config import OptimConfig
from llava_jax.train.objectives import Context, Sums, next_token
from llava_jax.train.optim import make_optimizer
from llava_jax.train.step import make_step
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


@functools.cache
def _start() -> tuple[dict, dict]:
    values = random_parameters(LLAVA, ("tower", "projector", "decoder"), seed=0)
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
