"""Orbax checkpoints of a workdir: what never changes once, what is trained at every saved step."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llava_jax.errors import CheckpointError
from llava_jax.models.parameters import Parameters

FROZEN = "frozen"
STEPS = "checkpoints"

# Orbax reports every phase of every save as a warning; what matters comes back as an exception.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """`DIR/checkpoints/<step>/{params,optimizer,position}` and `DIR/frozen`, layers always apart.

    Frozen parameters are written once; a step holds the trained ones, the optimizer's state and the position in
    the data together, and becomes visible by one rename.
    """

    def __init__(self, workdir: str, *, keep: int = 2):
        root = Path(workdir).absolute()
        self.frozen_path, self.steps_path = root / FROZEN, root / STEPS
        self._manager = ocp.CheckpointManager(
            self.steps_path,
            item_names=("params", "optimizer", "position"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest_step(self) -> int | None:
        """The newest step that was completely written."""
        return self._manager.latest_step()

    def save(self, step: int, trainable: Parameters, opt_state: Any, position: Mapping[str, Any]) -> None:
        """Copies the arrays off the devices and goes on; they are written behind the loop's back."""
        with _named(f"step {step} of {self.steps_path} could not be written", "Free space; older steps are intact."):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(trainable),
                    optimizer=ocp.args.StandardSave(opt_state),
                    position=ocp.args.JsonSave(dict(position)),
                ),
            )

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        with _named(f"{self.steps_path} could not be written", "Free space; older steps are intact."):
            self._manager.wait_until_finished()

    def position(self, step: int) -> dict[str, Any]:
        """What was saved of the data's position and the run's identity."""
        with _named(f"step {step} of {self.steps_path} could not be read", "Delete it to fall back to the one before."):
            args = ocp.args.Composite(position=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["position"]

    def restore(self, step: int, trainable: Any, opt_state: Any) -> tuple[Parameters, Any]:
        """Trained parameters and optimizer state, in the shapes, dtypes and shardings of the arguments."""
        with _named(
            f"step {step} of {self.steps_path} does not fit the model, its trainable parts and the optimizer",
            "Go on with the config that wrote it, or choose another --workdir.",
        ):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(trainable), optimizer=ocp.args.StandardRestore(opt_state)
                ),
            )
        return restored["params"], restored["optimizer"]

    def save_frozen(self, frozen: Parameters) -> None:
        """Writes the parameters that this run never changes, over those of a start that saved no step."""
        if frozen:
            with _named(f"{self.frozen_path} could not be written", "Free space and start again."):
                _save_tree(self.frozen_path, frozen)

    def restore_frozen(self, frozen: Any) -> Parameters:
        """The frozen parameters in the shapes, dtypes and shardings of the argument."""
        if not frozen:
            return {}
        with _named(f"{self.frozen_path} does not fit the model", "Choose another --workdir."):
            return _restore_tree(self.frozen_path, frozen)

    def close(self) -> None:
        self._manager.close()


def read_workdir(workdir: str) -> Parameters:
    """All parameters of a workdir's newest step, on this host's first device."""
    root = Path(workdir).absolute()
    step = ocp.utils.checkpoint_steps(root / STEPS) if (root / STEPS).is_dir() else []
    if not step:
        raise CheckpointError(f"A workdir must hold a saved step; {workdir!r} holds none. Train it first.")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    values: Parameters = {}
    with _named(f"{workdir!r} could not be read", "Train it again or take another folder."):
        for path in (root / FROZEN, root / STEPS / str(max(step)) / "params"):
            if path.exists():
                with ocp.StandardCheckpointer() as checkpointer:
                    shapes = checkpointer.metadata(path).item_metadata.tree
                target = {
                    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in shapes.items()
                }
                values |= _restore_tree(path, target)
    return values


def _save_tree(path: Path, tree: Parameters) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, force=True)


def _restore_tree(path: Path, target: Any) -> Parameters:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


@contextlib.contextmanager
def _named(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever Orbax raises into one error that says which checkpoint it was."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{what}: {reason[:400]}. {remedy}") from error
