"""The state of a run: made fresh from `init`, or restored from its newest checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llava_jax.convert.folder import check_parameters, read_parameters
from llava_jax.errors import UserError
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.parameters import Parameters, part, stack_layers, unstack_layers
from llava_jax.train.checkpoint import Checkpoints
from llava_jax.train.config import TrainConfig
from llava_jax.train.sharding import AnyMesh, like_parameters, parameter_shardings


@dataclasses.dataclass(kw_only=True)
class State:
    """What a step changes, what it only reads, and how many steps were taken."""

    step: int
    trainable: Parameters
    frozen: Parameters
    opt_state: Any


class Layout:
    """Abstract values of a run's state on its mesh: as it lies in memory, and as it lies on disk.

    They differ when layers are stacked in memory; on disk layers are always apart.
    """

    def __init__(self, config: TrainConfig, optimizer: optax.GradientTransformation, mesh: AnyMesh):
        self.config, self.mesh = config, mesh
        self.graphdef: nnx.GraphDef = structure(config.model, stacked=config.stacked)[0]
        self.parameters: Parameters = structure(config.model)[1]
        parts = {part(name) for name in self.parameters}
        for field, names in (("trainable", set(config.trainable)), ("init", set(config.init))):
            if not names <= parts or (field == "init" and names != parts):
                raise UserError(
                    f"{field} must name parts of the model, which has {', '.join(sorted(parts))}; "
                    f"got {', '.join(sorted(names))}."
                )
        unused = set(config.optim.part_learning_rates) - set(config.trainable)
        if unused:
            raise UserError(
                f"optim.part_learning_rates must name trainable parts, {', '.join(config.trainable)}; "
                f"got {', '.join(sorted(unused))}."
            )
        trainable = {n: v for n, v in self.parameters.items() if part(n) in config.trainable}
        frozen = {
            n: jax.ShapeDtypeStruct(v.shape, config.compute_dtype)
            for n, v in self.parameters.items()
            if n not in trainable
        }
        opt_state = jax.eval_shape(optimizer.init, trainable)
        self.disk = self._placed(trainable, frozen, opt_state)
        if config.stacked:
            stacked = jax.eval_shape(lambda *trees: tuple(map(stacked_tree, trees)), trainable, frozen, opt_state)
            self.memory = self._placed(*stacked)
        else:
            self.memory = self.disk

    def _placed(self, trainable: Parameters, frozen: Parameters, opt_state: Any) -> tuple[Any, Any, Any]:
        """The abstract trees with the sharding of every leaf."""
        shardings = parameter_shardings(trainable | frozen, self.mesh)
        trees = (trainable, frozen, opt_state)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            trees,
            tuple(like_parameters(tree, shardings, self.mesh) for tree in trees),
        )


def fresh_state(layout: Layout, optimizer: optax.GradientTransformation, checkpoints: Checkpoints) -> State:
    """Step 0: every part from where `init` says; the frozen parts go to disk once."""
    config = layout.config
    values: dict[str, Any] = {}
    random = {name for name, source in config.init.items() if source == "random"}
    if random:
        values |= random_parameters(config.model, random, seed=config.seed)
    for name, source in config.init.items():
        if name not in random:
            found = read_parameters(source, {name})
            expected = {n: v for n, v in layout.parameters.items() if part(n) == name}
            check_parameters(found, expected, f"init.{name}={source}")
            values |= found
    trainable, frozen, _ = layout.disk
    checkpoints.save_frozen({name: jax.device_put(values[name], target.sharding) for name, target in frozen.items()})
    trainable, frozen = _to_memory(layout, tuple(_put(values, targets) for targets in (trainable, frozen)))
    make = jax.jit(optimizer.init, out_shardings=_shardings(layout.memory[2]))
    return State(step=0, trainable=trainable, frozen=frozen, opt_state=make(trainable))


def restored_state(layout: Layout, checkpoints: Checkpoints, step: int) -> State:
    """The state at a saved step."""
    trainable, opt_state = checkpoints.restore(step, layout.disk[0], layout.disk[2])
    frozen = checkpoints.restore_frozen(layout.disk[1])
    trainable, frozen, opt_state = _to_memory(layout, (trainable, frozen, opt_state))
    return State(step=step, trainable=trainable, frozen=frozen, opt_state=opt_state)


def saved_trees(layout: Layout, state: State) -> tuple[Parameters, Any]:
    """What a checkpoint holds of a state: trained parameters and optimizer state, layers apart."""
    if not layout.config.stacked:
        return state.trainable, state.opt_state
    trainable, _, opt_state = layout.disk
    apart = jax.jit(lambda trees: tuple(map(unstacked_tree, trees)), out_shardings=_shardings((trainable, opt_state)))
    return apart((state.trainable, state.opt_state))


def stacked_tree(tree: Any) -> Any:
    """`stack_layers` on every flat dictionary of parameters inside a tree."""
    return jax.tree.map(lambda node: stack_layers(node) if isinstance(node, dict) else node, tree, is_leaf=_is_dict)


def unstacked_tree(tree: Any) -> Any:
    """`unstack_layers` on every flat dictionary of parameters inside a tree."""
    return jax.tree.map(lambda node: unstack_layers(node) if isinstance(node, dict) else node, tree, is_leaf=_is_dict)


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)


def _to_memory(layout: Layout, trees: tuple[Any, ...]) -> tuple[Any, ...]:
    if not layout.config.stacked:
        return trees
    targets = layout.memory[: len(trees)]
    return jax.jit(lambda trees: tuple(map(stacked_tree, trees)), out_shardings=_shardings(targets))(trees)


def _put(values: Mapping[str, Any], targets: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Values on the mesh, in the dtype that the run holds them in."""
    return {
        name: jax.device_put(jnp.asarray(values[name], target.dtype), target.sharding)
        for name, target in targets.items()
    }


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
