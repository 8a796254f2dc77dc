"""Floating-point operations of a step, counted from the traced model."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.sharding import Mesh
from jaxtyping import Array, Float

from llava_jax.chips import KINDS
from llava_jax.models.attention import Scope, attend_whole, unconstrained
from llava_jax.models.layers import Remat
from llava_jax.models.lora import dropout_keys
from llava_jax.models.parameters import Parameters, bind
from llava_jax.train.objectives import Context
from llava_jax.train.state import Layout
from llava_jax.train.step import cast

# How the counts are to be read, for whoever prints them.
CONVENTION = (
    "matrix products only, 2 per multiply-add; once forward and once more for each operand that a trained parameter "
    "reaches, so frozen parts cost no weight gradient and a frozen tower no backward pass; causal attention counted "
    "as half of the square of the row; padding counted; the head counted for every slot, supervised or not; "
    "recomputation not counted"
)


def model_flops(layout: Layout, batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """FLOPs that a step of this batch needs, whatever device and implementation runs it (see `CONVENTION`)."""
    full, halved = (_trace(layout, batch, attend, None) for attend in (attend_whole, _attend_freely))
    return (_total(full) + _total(halved)) // 2


def seconds_at_peak(layout: Layout, batch: Mapping[str, jax.Array]) -> float | None:
    """What a step of this batch would take at the published bfloat16 peak of its devices: MFU is this over its time.

    None where no peak is published, as for CPUs (`llava_jax/chips.py`).
    """
    assert isinstance(layout.mesh, Mesh), "a step is timed on devices"
    chip = KINDS.get(layout.mesh.devices.flat[0].device_kind)
    if chip is None:
        return None
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in batch.items()}
    return model_flops(layout, shapes) / (layout.mesh.size * chip.flops)


def executed_flops(layout: Layout, batch: Mapping[str, jax.ShapeDtypeStruct], remat: Remat) -> int:
    """The FLOPs of `model_flops` and of what the backward pass computes again: at least this is executed."""

    def gradient_flops(attend: Any) -> int:
        trainable, frozen, _ = layout.memory

        def gradient(trainable: Parameters, frozen: Parameters, batch: Mapping[str, Array]):
            return jax.grad(lambda trainable: _loss(layout, trainable, frozen, batch, attend, remat))(trainable)

        traced = jax.make_jaxpr(gradient)(trainable, frozen, dict(batch))
        return matmul_flops(traced.jaxpr, [False] * len(traced.jaxpr.invars))[0]

    return (gradient_flops(attend_whole) + gradient_flops(_attend_freely)) // 2


def _attend_freely(
    q: Float[Array, "b t n h"], k: Float[Array, "b s k h"], v: Float[Array, "b s k h"], scope: Scope
) -> Float[Array, "b t n h"]:
    """Attention whose causal half costs nothing, and whose result depends on all that it should."""
    if not scope.causal:
        return attend_whole(q, k, v, scope)
    groups = q.shape[2] // k.shape[2]
    return q + jnp.repeat((k + v).mean(axis=1, keepdims=True), groups, axis=2).astype(q.dtype)


def _loss(layout: Layout, trainable: Any, frozen: Any, batch: Any, attend: Any, remat: Remat) -> Float[Array, ""]:
    values = cast(trainable | frozen, layout.config.compute_dtype) | dropout_keys(layout.bound, jax.random.key(0))
    context = Context(attend=attend, constrain=unconstrained, remat=remat)
    return layout.config.objective(bind(layout.graphdef, values), batch, context).loss


def _trace(layout: Layout, batch: Mapping[str, Any], attend: Any, remat: Remat) -> tuple[ClosedJaxpr, list[bool]]:
    """The forward pass of a step, and which of its inputs are trained."""
    trainable, frozen, _ = layout.memory
    loss = functools.partial(_loss, layout, attend=attend, remat=remat)
    traced = jax.make_jaxpr(loss)(trainable, frozen, dict(batch))
    trained = [index < len(trainable) for index in range(len(traced.jaxpr.invars))]
    return traced, trained


def _total(traced: tuple[ClosedJaxpr, list[bool]]) -> int:
    closed, trained = traced
    return matmul_flops(closed.jaxpr, trained)[0]


def matmul_flops(jaxpr: Jaxpr, reached: Sequence[bool]) -> tuple[int, list[bool]]:
    """FLOPs of a function, and which results a trained parameter reaches, from which of its inputs one does."""
    known = dict(zip(jaxpr.invars, reached, strict=True))

    def look(atom: Any) -> bool:
        return False if isinstance(atom, Literal) else known.get(atom, False)

    total = 0
    for equation in jaxpr.eqns:
        flops, results = _equation_flops(equation, [look(atom) for atom in equation.invars])
        total += flops
        for variable, result in zip(equation.outvars, results, strict=True):
            # Nothing flows back through integers and truth values.
            known[variable] = result and jnp.issubdtype(_aval(variable).dtype, jnp.inexact)
    return total, [look(atom) for atom in jaxpr.outvars]


def _aval(atom: Any) -> Any:
    return atom.aval


def _open(jaxpr: Any) -> Jaxpr:
    """Without the constants that older versions of JAX close it over."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _equation_flops(equation: JaxprEqn, reached: list[bool]) -> tuple[int, list[bool]]:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = _aval(equation.invars[0]).shape
        once = 2 * _aval(equation.outvars[0]).size * math.prod(shape[axis] for axis in contracted)
        return once * (1 + sum(reached)), [any(reached)]
    if name == "scan":
        return _scan_flops(parameters, reached)
    if name == "cond":
        branches = [matmul_flops(_open(branch), reached[1:]) for branch in parameters["branches"]]
        # What is done in another way on some devices takes as much as the cheapest of them, at least.
        choose = max if parameters.get("branches_platforms") is None else min
        return choose(flops for flops, _ in branches), [any(r) for r in zip(*(r for _, r in branches), strict=True)]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in parameters:
            return matmul_flops(_open(parameters[key]), reached)
    if name == "optimization_barrier":
        # It hands on each of its inputs by itself.
        return 0, reached
    assert name not in ("while", "conv_general_dilated"), f"FLOPs of {name} are not counted"
    return 0, [any(reached)] * len(equation.outvars)


def _scan_flops(parameters: Mapping[str, Any], reached: list[bool]) -> tuple[int, list[bool]]:
    """The body's, times the turns; what reaches a carry in one turn reaches it in all."""
    if "ft_in" in parameters:  # From JAX 0.12 on.
        constants, carries, _ = map(len, parameters["ft_in"].unpack())
    else:
        constants, carries = parameters["num_consts"], parameters["num_carry"]
    reached = list(reached)
    while True:
        flops, results = matmul_flops(_open(parameters["jaxpr"]), reached)
        carried = [a or b for a, b in zip(reached[constants : constants + carries], results, strict=False)]
        if carried == reached[constants : constants + carries]:
            return flops * parameters["length"], carried + results[carries:]
        reached[constants : constants + carries] = carried
