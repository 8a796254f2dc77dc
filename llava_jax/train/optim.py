"""AdamW as the original runs it: warmup, cosine, clipping, a rate for each part of the model."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

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


def hold_in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Adam whose moments lie in bfloat16 between steps, rounded up or down at random so that the mean is exact.

    Rounding to the nearest would freeze the second moment: at b2 = 0.999 a step changes it by at most a thousandth
    when it falls, less than half of bfloat16's last digit.
    """

    def init(params: optax.Params) -> Any:
        state: Any = adam.init(params)
        mu, nu = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), moment) for moment in (state.mu, state.nu))
        return state._replace(mu=mu, nu=nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mu, nu = (jax.tree.map(lambda x: x.astype(jnp.float32), moment) for moment in (state.mu, state.nu))
        updates, new = cast(tuple[Any, Any], adam.update(updates, state._replace(mu=mu, nu=nu), params))
        key = jax.random.fold_in(jax.random.key(0), state.count)
        rounded = {name: _rounded(new.mu[name], new.nu[name], key, name) for name in new.mu}
        mu, nu = ({name: pair[i] for name, pair in rounded.items()} for i in (0, 1))
        return updates, new._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def _rounded(mu: Array, nu: Array, key: Array, name: str) -> tuple[Array, Array]:
    """Each float32 as one of its two bfloat16 neighbours, the nearer with the larger probability."""
    # One draw for both: a half of its bits each.
    noise = jax.random.bits(jax.random.fold_in(key, zlib.crc32(name.encode())), mu.shape, jnp.uint32)

    def rounded(x: Array, noise: Array) -> Array:
        # A bfloat16 is the upper half of a float32: what the noise carries over from the lower half rounds it up.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)

    return rounded(mu, noise >> 16), rounded(nu, noise & 0xFFFF)


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clip, Adam computed in float32, decoupled decay (none on norms and biases), rates.

    `torch.optim.AdamW` under `LLaVATrainer.create_optimizer` of the original.
    """
    factor = cosine_factor(num_steps, config.warmup_ratio)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        adam if config.moments == "float32" else hold_in_bfloat16(adam),
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
