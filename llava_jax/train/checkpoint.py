"""Orbax checkpoints of a workdir: what never changes once, what is trained at every saved step."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, Bool
from orbax.checkpoint import checkpoint_managers

from llava_jax.convert.integrity import Damaged, compare, digest, fingerprints
from llava_jax.convert.workdir import (
    FROZEN,
    STEPS,
    compare_frozen,
    named_errors,
    read_record,
    restore_tree,
    tree_shapes,
)
from llava_jax.errors import NumericsError
from llava_jax.models.parameters import Parameters
from llava_jax.train import processes
from llava_jax.train.mirror import is_remote, move

# Seconds that a save may take behind the loop's back.
PATIENCE = 24 * 3600
# Where damaged steps are put aside; nothing reads them again.
DAMAGED = "damaged"


class Checkpoints:
    """`DIR/checkpoints/<step>/{params,optimizer,position,integrity}` and `DIR/frozen`, layers always apart.

    Frozen parameters are written once; a step holds the trained ones, the optimizer's state, the position in
    the data and the fingerprints of all of it together, and becomes visible by one rename. The newest `keep` steps
    are kept, and the one with the least `eval_loss` beside them.
    """

    def __init__(self, workdir: str, *, keep: int = 2):
        root = epath.Path(workdir) if is_remote(workdir) else Path(workdir).absolute()
        self.frozen_path, self.steps_path, self._damaged_path = root / FROZEN, root / STEPS, root / DAMAGED
        self._frozen: dict[str, str] = {}
        self._clear_unfinished()
        best = checkpoint_managers.BestN(
            get_metric_fn=_eval_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = ocp.CheckpointManager(
            self.steps_path,
            item_names=("params", "optimizer", "position", "integrity"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [checkpoint_managers.LatestN(keep), best]
                ),
                best_fn=_eval_loss,
                best_mode="min",
                create=True,
                # As long as it takes: a slow disk needs longer than Orbax grants, and would at the next start too.
                async_options=ocp.AsyncOptions(timeout_secs=PATIENCE),
            ),
        )

    def _clear_unfinished(self) -> None:
        """Removes what a killed run left half written, which would stay for ever.

        Orbax would do it while it lists the folder; one of a bucket is gone with its last file, and cannot be listed.
        """
        what = f"{self.steps_path} could not be cleared of steps that are half written"
        with (
            processes.first_before_others("unfinished"),
            named_errors(what, "Check its permissions, and that no other process writes there."),
        ):
            if processes.is_first():
                for unfinished in ocp.utils.tmp_checkpoints(self.steps_path):
                    unfinished.get().rmtree()

    def steps(self) -> list[int]:
        """Steps that were completely written, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def rehearse(self, trainable: Parameters, opt_state: Any) -> None:
        """Compiles what a save computes: the first one, which SIGTERM may ask for, waits for no compiler."""
        _are_finite((trainable, opt_state))
        fingerprints((trainable, opt_state))

    def save(
        self,
        step: int,
        trainable: Parameters,
        opt_state: Any,
        position: Mapping[str, Any],
        *,
        eval_loss: float | None = None,
    ) -> None:
        """Copies the arrays off the devices and goes on; they are written behind the loop's back.

        Raises:
          NumericsError: a value is not finite.
        """
        _check_finite((trainable, opt_state), f"step {step}")
        with named_errors(
            f"step {step} of {self.steps_path} could not be written", "Free space; older steps are intact."
        ):
            record = {
                "params": fingerprints(trainable),
                "optimizer": fingerprints(opt_state),
                "frozen": self._frozen,
                "position": digest(dict(position)),
            }
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(trainable),
                    optimizer=ocp.args.StandardSave(opt_state),
                    position=ocp.args.JsonSave(dict(position)),
                    integrity=ocp.args.JsonSave(record | {"digest": digest(record)}),
                ),
                # A loss that is not a number is less than none: no step would ever be better.
                metrics={"eval_loss": eval_loss} if eval_loss is not None and math.isfinite(eval_loss) else None,
            )

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        with self._named_write():
            self._manager.wait_until_finished()

    def position(self, step: int) -> dict[str, Any]:
        """What was saved of the data's position and the run's identity; raises `Damaged`."""
        folder = self.steps_path / str(step)
        with named_errors(f"{self._what(step)} could not be read", "", Damaged):
            position = json.loads((folder / "position" / "metadata").read_text())
        if digest(position) != read_record(folder)["position"]:
            raise Damaged(f"{self._what(step)} is damaged: its position differs from what was saved.")
        return position

    def restore(self, step: int, trainable: Any, opt_state: Any) -> tuple[Parameters, Any]:
        """Trained parameters and optimizer state, in the shapes, dtypes and shardings of the arguments.

        Each process reads its share and waits for nobody; `check` what came of it.

        Raises:
          Damaged: something of the step cannot be read.
        """
        folder = self.steps_path / str(step)
        with named_errors(f"{self._what(step)} could not be read", "", Damaged):
            return restore_tree(folder / "params", trainable), restore_tree(folder / "optimizer", opt_state)

    def check(self, step: int, trainable: Parameters, opt_state: Any) -> None:
        """Raises `Damaged` unless these are what was saved; computed by all processes together."""
        record = read_record(self.steps_path / str(step))
        for item, values in (("params", trainable), ("optimizer", opt_state)):
            compare(fingerprints(values), record[item], f"the {item} of {self._what(step)}")
        self._frozen = record["frozen"]

    def _what(self, step: int) -> str:
        return f"step {step} of {self.steps_path}"

    def put_aside(self, step: int) -> None:
        """Moves a damaged step out of the way of its repetition."""
        if processes.is_first():
            with named_errors(f"{self._what(step)} could not be put aside", "It is damaged: move it away."):
                move(self.steps_path / str(step), self._damaged_path / f"{step}-{os.getpid()}")
        processes.all_agree(f"aside/{step}", True)
        self._manager.reload()

    def save_frozen(self, frozen: Parameters) -> None:
        """Writes the parameters that this run never changes, over those of a start that saved no step."""
        self._frozen = fingerprints(frozen)
        if frozen:
            remedy = "Free space and start again."
            with named_errors(f"{self.frozen_path} could not be written", remedy), ocp.StandardCheckpointer() as writer:
                writer.save(self.frozen_path, frozen, force=True)

    def restore_frozen(self, frozen: Any) -> Parameters:
        """The frozen parameters in the shapes, dtypes and shardings of the argument, as the restored step knew them."""
        if not frozen:
            return {}
        remedy = "Put it back from a copy, or choose another --workdir."
        with named_errors(f"{self.frozen_path} could not be read", remedy):
            # Read in the dtype of their source, in which they were written and are compared.
            saved = tree_shapes(self.frozen_path)
            target = {n: jax.ShapeDtypeStruct(v.shape, saved[n].dtype, sharding=v.sharding) for n, v in frozen.items()}
            values = restore_tree(self.frozen_path, target)
        compare_frozen(fingerprints(values), self._frozen, self.frozen_path)
        # One after the other: there is no room for all of them in both dtypes.
        return {name: values.pop(name).astype(frozen[name].dtype) for name in list(values)}

    def close(self) -> None:
        # A save that failed behind the loop's back is reported here too.
        with self._named_write():
            self._manager.close()

    def _named_write(self) -> contextlib.AbstractContextManager[None]:
        return named_errors(f"{self.steps_path} could not be written", "Free space; older steps are intact.")


def _eval_loss(metrics: Mapping[str, float]) -> float:
    return metrics["eval_loss"]


def _check_finite(trees: Any, what: str) -> None:
    """A finite loss and gradient do not make a finite update, if a rate is too large for a number to hold."""
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    flags = jax.device_get(_are_finite(trees))
    bad = [jax.tree_util.keystr(path) for (path, _), ok in zip(leaves, flags, strict=True) if not ok]
    if bad:
        raise NumericsError(
            f"What is saved must be finite; {what} is not in {', '.join(bad[:3])}. It was not saved. Lower "
            "optim.learning_rate."
        )


@jax.jit
def _are_finite(trees: Any) -> list[Bool[Array, ""]]:
    return [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trees)]
