"""The state of a run: made fresh from `init`, or restored from its newest checkpoint."""

import dataclasses
import functools
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llava_jax.convert.arrays import place_all
from llava_jax.convert.folder import check_parameters, read_part
from llava_jax.convert.integrity import Damaged
from llava_jax.errors import CheckpointError, UserError
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.lora import DROPOUT, initial_factor, is_adapter
from llava_jax.models.parameters import Parameters, layer_runs, part, stack_layers, unstack_layers
from llava_jax.models.quantized import is_quantized
from llava_jax.train import processes
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
        # All that the model is bound to in a step: its parameters in memory, and the keys of its dropout.
        self.graphdef, self.bound = structure(
            config.model, stacked=config.stacked, quantize=config.quantize, lora=config.lora
        )
        abstract = structure(config.model, quantize=config.quantize, lora=config.lora)[1]
        self.parameters: Parameters = {n: v for n, v in abstract.items() if not n.endswith(DROPOUT)}
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
        trainable = {n: v for n, v in self.parameters.items() if learns(n, config)}
        frozen = {
            n: jax.ShapeDtypeStruct(v.shape, v.dtype if is_quantized(n) else config.compute_dtype)
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

    @functools.cached_property
    def take_apart(self) -> Callable[[tuple[Any, Any]], tuple[Any, Any]]:
        """From trained parameters and optimizer state in memory to those on disk; compiled once."""
        trainable, _, opt_state = self.disk
        shardings = _shardings((trainable, opt_state))
        return jax.jit(lambda trees: tuple(map(unstacked_tree, trees)), out_shardings=shardings)

    def _placed(self, trainable: Parameters, frozen: Parameters, opt_state: Any) -> tuple[Any, Any, Any]:
        """The abstract trees with the sharding of every leaf."""
        shardings = parameter_shardings(trainable | frozen, self.mesh)
        trees = (trainable, frozen, opt_state)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            trees,
            tuple(like_parameters(tree, shardings, self.mesh) for tree in trees),
        )


def learns(name: str, config: TrainConfig) -> bool:
    """Whether a run trains a parameter."""
    return part(name) in config.trainable and (config.lora is None or part(name) != "decoder" or is_adapter(name))


def fresh_state(layout: Layout, optimizer: optax.GradientTransformation, checkpoints: Checkpoints) -> State:
    """Step 0: every part from where `init` says; the frozen parts go to disk once."""
    config = layout.config
    values: dict[str, Any] = {}
    random = {name for name, source in config.init.items() if source == "random"}
    if random:
        values |= random_parameters(config.model, random, seed=config.seed)
    for name, source in config.init.items():
        if name not in random:
            found = read_part(source, name, config.model)
            expected = {n: v for n, v in structure(config.model)[1].items() if part(n) == name}
            check_parameters(found, expected, f"init.{name}={source}")
            _check_same_source(name, source, found)
            values |= found
    for name, value in layout.parameters.items():
        if is_adapter(name):
            rng = np.random.default_rng((config.seed, zlib.crc32(name.encode())))
            values[name] = initial_factor(name, value.shape, rng)
    trainable, frozen, _ = layout.disk
    as_found = {
        n: t if is_quantized(n) else jax.ShapeDtypeStruct(t.shape, values[n].dtype, sharding=t.sharding)
        for n, t in frozen.items()
    }
    checkpoints.save_frozen(place_all(values, as_found))
    trainable, frozen = _to_memory(layout, tuple(place_all(values, targets) for targets in (trainable, frozen)))
    make = jax.jit(optimizer.init, out_shardings=_shardings(layout.memory[2]))
    return State(step=0, trainable=trainable, frozen=frozen, opt_state=make(trainable))


def _check_same_source(name: str, source: str, found: Mapping[str, Any]) -> None:
    """Every process opens its own copy, and one may be older: compared by the part's vectors, which are quick to read.

    Raises:
      UserError: the copies differ.
    """
    if processes.are_several():
        vectors = (np.asarray(value[...]).tobytes() for _, value in sorted(found.items()) if len(value.shape) == 1)
        processes.check_same(f"init/{name}", str(zlib.crc32(b"".join(vectors))), f"weights in init.{name}={source}")


def resumed_state(layout: Layout, checkpoints: Checkpoints, check: Callable[[Mapping[str, Any]], None]) -> State | None:
    """The state at the newest good step, or None where no step was saved; `check` refuses another run's position.

    A damaged step is put aside, with a warning, once an older one turned out to be good.
    """
    damaged: dict[int, str] = {}
    processes.check_same("steps", repr(checkpoints.steps()), "saved steps in --workdir, a folder that all share")
    for step in checkpoints.steps():
        restored, reason = None, f"Another process found step {step} damaged."
        try:
            check(checkpoints.position(step))
            restored = checkpoints.restore(step, layout.disk[0], layout.disk[2])
        except Damaged as error:
            reason = str(error)
        # What follows is computed by all together, who wait for each other in it: each must have read its share.
        if processes.all_agree(f"read/{step}", restored is not None) and restored is not None:
            try:
                checkpoints.check(step, *restored)
                is_good = True
            except Damaged as error:
                reason, is_good = str(error), False
            if processes.all_agree(f"restored/{step}", is_good):
                break
        damaged[step] = reason
    else:
        if damaged:
            raise CheckpointError(
                f"No saved step is good, and a run never starts anew in silence: {' '.join([*damaged.values()][:2])} "
                "Put a copy back, or choose another --workdir."
            )
        return None
    frozen = checkpoints.restore_frozen(layout.disk[1])
    for number in damaged:
        checkpoints.put_aside(number)
    for reason in damaged.values():
        print(f"llava-jax: {reason} It was put aside; going on from step {step}.", file=sys.stderr, flush=True)
    trainable, frozen, opt_state = _to_memory(layout, (restored[0], frozen, restored[1]))
    return State(step=step, trainable=trainable, frozen=frozen, opt_state=opt_state)


def saved_trees(layout: Layout, state: State) -> tuple[Parameters, Any]:
    """What a checkpoint holds of a state: trained parameters and optimizer state, layers apart."""
    if not layout.config.stacked:
        return state.trainable, state.opt_state
    return layout.take_apart((state.trainable, state.opt_state))


def stacked_tree(tree: Any) -> Any:
    """`stack_layers` on every flat dictionary of parameters inside a tree."""
    return jax.tree.map(lambda node: stack_layers(node) if isinstance(node, dict) else node, tree, is_leaf=_is_dict)


def unstacked_tree(tree: Any) -> Any:
    """`unstack_layers` on every flat dictionary of parameters inside a tree."""
    return jax.tree.map(lambda node: unstack_layers(node) if isinstance(node, dict) else node, tree, is_leaf=_is_dict)


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)


def _to_memory(layout: Layout, trees: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same as it lies in memory; stacked layers take the place of those apart, one name after the other."""
    if not layout.config.stacked:
        return trees

    def move(node: Any, targets: Any) -> Any:
        if not isinstance(node, dict):
            return node
        moved: Parameters = {}
        for stacked, names in layer_runs(list(node)).items():
            # The last ones to hold them: there is no room for all parameters twice.
            apart = [node.pop(name) for name in names]
            moved[stacked] = apart[0] if names == [stacked] else _stacker(targets[stacked].sharding)(*apart)
        return moved

    return jax.tree.map(move, trees, layout.memory[: len(trees)], is_leaf=_is_dict)


@functools.cache
def _stacker(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda *layers: jnp.stack(layers), out_shardings=sharding)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
