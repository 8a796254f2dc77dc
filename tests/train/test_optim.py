"""The optimizer against torch, the schedule against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.train.config import OptimConfig
from llava_jax.train.optim import cosine_factor, hold_in_bfloat16, make_optimizer, make_schedule

NUM_STEPS = 30


@pytest.mark.parametrize(
    ("num_steps", "ratio"), [(1, 0.03), (2, 0.03), (20, 0.03), (34, 0.03), (100, 0.03), (7, 0.5), (10, 0.0), (5, 1.0)]
)
def test_the_schedule_is_that_of_transformers(num_steps: int, ratio: float):
    import math

    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(num_steps * ratio), num_steps)
    expected = []
    for _ in range(num_steps):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    factor = cosine_factor(num_steps, ratio)
    np.testing.assert_allclose([factor(jnp.array(step)) for step in range(num_steps)], expected, rtol=0, atol=1e-6)


def test_warmup_steps_are_rounded_up_and_the_first_rate_is_zero():
    factor = cosine_factor(34, 0.03)
    np.testing.assert_allclose([factor(jnp.array(step)) for step in (0, 1, 2)], [0, 0.5, 1], atol=1e-7)


def test_the_logged_rate_is_the_rate_that_is_used():
    config = OptimConfig(learning_rate=2e-5, warmup_ratio=0.1)
    factor, logged = cosine_factor(NUM_STEPS, 0.1), make_schedule(config, NUM_STEPS)
    for step in range(NUM_STEPS):
        assert logged(step) == pytest.approx(2e-5 * float(factor(jnp.array(step))), rel=1e-6)


NAMES = ("projector.linear.kernel", "projector.linear.bias", "decoder.norm.scale", "decoder.lm_head.kernel")


def _start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((3, 4), (4,), (5,), (5, 2))
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in zip(NAMES, shapes, strict=True)}


def _gradient(name: str, value, step: int):
    """Of a toy problem whose gradients now and then exceed the clipping norm; the same code serves both libraries."""
    return value * (0.5 + NAMES.index(name)) * (3.0 if step % 5 == 0 else 0.1)


def _ours(config: OptimConfig) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(config, NUM_STEPS)
    params = {name: jnp.asarray(value) for name, value in _start().items()}
    state = optimizer.init(params)
    for step in range(NUM_STEPS):
        gradients = {name: _gradient(name, value, step) for name, value in params.items()}
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return {name: np.asarray(value) for name, value in params.items()}


def _torch(config: OptimConfig) -> dict[str, np.ndarray]:
    """AdamW under `LLaVATrainer.create_optimizer`: groups by part and by decay, then the Trainer's loop."""
    import math

    import torch
    from transformers import get_cosine_schedule_with_warmup

    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in _start().items()}
    groups = [
        {
            "params": [value],
            "lr": config.part_learning_rates.get(name.partition(".")[0], config.learning_rate),
            "weight_decay": 0.0 if name.endswith(("bias", "scale")) else config.weight_decay,
        }
        for name, value in params.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.b1, config.b2), eps=config.eps)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(NUM_STEPS * config.warmup_ratio), NUM_STEPS)
    for step in range(NUM_STEPS):
        for name, value in params.items():
            value.grad = _gradient(name, value.detach(), step)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params.values(), config.clip_norm)
        optimizer.step()
        schedule.step()
    return {name: value.detach().numpy() for name, value in params.items()}


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(learning_rate=1e-2),
        OptimConfig(learning_rate=1e-2, clip_norm=None),
        OptimConfig(learning_rate=1e-2, weight_decay=0.1),
        OptimConfig(learning_rate=1e-2, part_learning_rates={"projector": 3e-2}, weight_decay=0.1, clip_norm=0.3),
        OptimConfig(learning_rate=1e-2, b1=0.8, b2=0.95, eps=1e-6, warmup_ratio=0.2),
    ],
    ids=str,
)
def test_trajectories_are_those_of_torch(config: OptimConfig):
    ours, theirs = _ours(config), _torch(config)
    for name in NAMES:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5, err_msg=name)


def test_a_rate_of_a_part_moves_that_part_alone():
    # Without clipping: its norm is that of the whole model.
    plain = _ours(OptimConfig(learning_rate=1e-2, clip_norm=None))
    still = _ours(OptimConfig(learning_rate=1e-2, clip_norm=None, part_learning_rates={"projector": 0.0}))
    for name, value in _start().items():
        if name.startswith("projector."):
            np.testing.assert_array_equal(still[name], value)
        else:
            np.testing.assert_array_equal(still[name], plain[name])


def test_norms_and_biases_do_not_decay():
    config = OptimConfig(learning_rate=1e-2, weight_decay=0.5, warmup_ratio=0.0)
    optimizer = make_optimizer(config, NUM_STEPS)
    params = {name: jnp.asarray(value) for name, value in _start().items()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for name, update in updates.items():
        expected = -1e-2 * 0.5 * params[name] if name.endswith("kernel") else jnp.zeros_like(update)
        np.testing.assert_allclose(update, expected, atol=1e-8)


def test_moments_are_float32_and_lie_under_the_parameters_names():
    params = {name: jnp.asarray(value) for name, value in _start().items()}
    state = make_optimizer(OptimConfig(learning_rate=1e-3), NUM_STEPS).init(params)
    adam = next(part for part in state if isinstance(part, optax.ScaleByAdamState))
    for moments in (adam.mu, adam.nu):
        assert {name: value.shape for name, value in moments.items()} == {n: v.shape for n, v in params.items()}
        assert all(value.dtype == jnp.float32 for value in moments.values())


def test_bfloat16_moments_follow_float32_ones():
    """The mean of 4096 equal parameters, whose moments are rounded each its own way, stays with the exact one."""
    start = {"decoder.norm.scale": jnp.ones(4096)}
    adam = optax.scale_by_adam(b1=0.9, b2=0.999)
    exact, rounded = adam, hold_in_bfloat16(adam)
    states = [exact.init(start), rounded.init(start)]
    assert {leaf.dtype for leaf in jax.tree.leaves((states[1].mu, states[1].nu))} == {jnp.dtype(jnp.bfloat16)}
    for size in [1.0] * 5 + [0.01] * 60:
        gradient = {"decoder.norm.scale": jnp.full(4096, size)}
        updates, states = zip(
            *(o.update(gradient, state, start) for o, state in zip((exact, rounded), states, strict=True)), strict=True
        )
    # Rounded to the nearest, the second moment would not fall at all: 6 % too large by now.
    for name in ("mu", "nu"):
        found, expected = (np.asarray(getattr(s, name)["decoder.norm.scale"], np.float32) for s in states[::-1])
        assert abs(found.mean() / expected.mean() - 1) < 0.004
    found, expected = (np.asarray(u["decoder.norm.scale"]).mean() for u in updates[::-1])
    assert abs(found / expected - 1) < 0.01


def test_bfloat16_moments_are_rounded_the_same_in_every_run():
    def run():
        optimizer = make_optimizer(OptimConfig(learning_rate=1e-2, moments="bfloat16"), 10)
        params = {"projector.linear.0.kernel": jnp.arange(12.0).reshape(3, 4)}
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(params, state, params)
        return jax.device_get((updates, state))

    jax.tree.map(np.testing.assert_array_equal, run(), run())
