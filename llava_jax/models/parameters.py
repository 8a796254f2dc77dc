"""Parameters as one flat dictionary, dotted path to array: what is trained, sharded, saved and converted."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

# Values are arrays: on devices, on the host (numpy), or abstract (`jax.ShapeDtypeStruct`).
Parameters = dict[str, Any]

_LAYER = re.compile(r"(?P<run>.*\blayers)\.(?P<index>\d+)\.(?P<rest>.*)")


def parameters(model: nnx.Module) -> Parameters:
    """Every parameter of a model by dotted path, such as `decoder.layers.0.mlp.up_proj.kernel`.

    Works on abstract models (`nnx.eval_shape`) too; the values are then `jax.ShapeDtypeStruct`.
    """
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(nnx.split(model)[1])}


class GraphDef:
    """The structure of a model: nnx's, with its hash computed once.

    `jax.jit` wants the hash of a static argument at every call; nnx walks through the whole model for it.
    """

    def __init__(self, nnx_graphdef: nnx.GraphDef):
        self.nnx = nnx_graphdef
        self._hash = hash(nnx_graphdef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, GraphDef) and self.nnx == other.nnx)


def skeleton(make: Callable[[], nnx.Module]) -> tuple[GraphDef, Parameters]:
    """The structure of a model and the abstract values of its parameters; allocates nothing."""
    model = nnx.eval_shape(make)
    return GraphDef(nnx.split(model)[0]), parameters(model)


def bind(graphdef: GraphDef, values: Mapping[str, Any]) -> Any:
    """The model whose structure is `graphdef` and whose parameters are `values` (all of them)."""
    state = nnx.from_flat_state([(_path(name), nnx.Param(value)) for name, value in values.items()])
    return nnx.merge(graphdef.nnx, state)


def layer_runs(names: Iterable[str]) -> dict[str, list[str]]:
    """What each stacked name stands for, in the order of the layers; a name outside of layers stands for itself."""
    runs: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = _LAYER.fullmatch(name)
        stacked, index = (f"{match['run']}.{match['rest']}", int(match["index"])) if match else (name, 0)
        runs.setdefault(stacked, []).append((index, name))
    return {stacked: [name for _, name in sorted(members)] for stacked, members in runs.items()}


def stack_layers(values: Mapping[str, Array]) -> Parameters:
    """Joins `layers.0.x, layers.1.x, ...` into `layers.x` with a leading layer axis, for `lax.scan`."""
    return {
        stacked: values[stacked] if names == [stacked] else jnp.stack([values[name] for name in names])
        for stacked, names in layer_runs(values).items()
    }


def unstack_layers(values: Mapping[str, Array]) -> Parameters:
    """The inverse of `stack_layers`."""
    unstacked: Parameters = {}
    for name, value in values.items():
        run, found, rest = name.partition(".layers.")
        if not found or _LAYER.fullmatch(name):
            unstacked[name] = value
        else:
            unstacked |= {f"{run}.layers.{i}.{rest}": layer for i, layer in enumerate(value)}
    return unstacked


def count(values: Mapping[str, Any]) -> int:
    """Number of scalars, from the shapes alone."""
    return sum(jax.numpy.size(value) if not hasattr(value, "size") else value.size for value in values.values())


def part(name: str) -> str:
    """The part of the model that a parameter belongs to: the first word of its path."""
    return name.partition(".")[0]


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(word) if word.isdigit() else word for word in name.split("."))
