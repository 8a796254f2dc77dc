"""Orbax checkpoints of a workdir: what never changes once, what is trained at every saved step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from llava_jax.convert.workdir import FROZEN, STEPS, named_errors, restore_tree
from llava_jax.models.parameters import Parameters


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
        with named_errors(
            f"step {step} of {self.steps_path} could not be written", "Free space; older steps are intact."
        ):
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
        with named_errors(f"{self.steps_path} could not be written", "Free space; older steps are intact."):
            self._manager.wait_until_finished()

    def position(self, step: int) -> dict[str, Any]:
        """What was saved of the data's position and the run's identity."""
        with named_errors(
            f"step {step} of {self.steps_path} could not be read", "Delete it to fall back to the one before."
        ):
            args = ocp.args.Composite(position=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["position"]

    def restore(self, step: int, trainable: Any, opt_state: Any) -> tuple[Parameters, Any]:
        """Trained parameters and optimizer state, in the shapes, dtypes and shardings of the arguments."""
        with named_errors(
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
            remedy = "Free space and start again."
            with named_errors(f"{self.frozen_path} could not be written", remedy), ocp.StandardCheckpointer() as writer:
                writer.save(self.frozen_path, frozen, force=True)

    def restore_frozen(self, frozen: Any) -> Parameters:
        """The frozen parameters in the shapes, dtypes and shardings of the argument."""
        if not frozen:
            return {}
        with named_errors(f"{self.frozen_path} does not fit the model", "Choose another --workdir."):
            return restore_tree(self.frozen_path, frozen)

    def close(self) -> None:
        self._manager.close()
