"""AdamW as the original runs it: warmup, cosine, clipping, a rate for each part of the model."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from llava_jax.models.parameters import Parameters, part
from llava_jax.train.config import OptimConfig

Schedule = Callable[[Int[Array, ""]], Float[Array, ""]]


def cosine_factor(num_steps: int, warmup_ratio: float) -> Schedule:
    """The factor on every learning rate at a step, counted from 0.

    Linear from 0 over ceil(ratio * steps) steps, then half a cosine to 0 (`get_cosine_schedule_with_warmup` of
    transformers); the first step has rate zero there, and so it has here.
    """
    warmup = math.ceil(num_steps * warmup_ratio)

    def factor(step: Int[Array, ""]) -> Float[Array, ""]:
        rising = step / max(1, warmup)
        progress = (step - warmup) / max(1, num_steps - warmup)
        falling = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        return jnp.where(step < warmup, rising, falling).astype(jnp.float32)

    return factor


class RateState(NamedTuple):
    count: Int[Array, ""]


def scale_by_part_rates(factor: Schedule, default: float, by_part: dict[str, float]) -> optax.GradientTransformation:
    """Multiplies each update by minus its part's learning rate at this step."""

    def init(params: optax.Params) -> RateState:
        del params
        return RateState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Parameters, RateState]:
        del params
        scale = -factor(state.count)
        scaled = {name: scale * by_part.get(part(name), default) * u for name, u in updates.items()}
        return scaled, RateState(state.count + 1)

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip, Adam moments in float32, decoupled decay (none on norms and biases), rates.

    `torch.optim.AdamW` under `LLaVATrainer.create_optimizer` of the original.
    """
    factor = cosine_factor(num_steps, config.warmup_ratio)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decays),
        scale_by_part_rates(factor, config.learning_rate, dict(config.part_learning_rates)),
    )


def _decays(params: Parameters) -> dict[str, bool]:
    return {name: not name.endswith((".bias", ".scale")) for name in params}


def make_schedule(config: OptimConfig, num_steps: int) -> Callable[[int], float]:
    """The default learning rate by step, on the host, for the log."""
    factor = cosine_factor(num_steps, config.warmup_ratio)
    rates = config.learning_rate * jax.device_get(jax.jit(jax.vmap(factor))(jnp.arange(num_steps)))
    return lambda step: float(rates[step])
