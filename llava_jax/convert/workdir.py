"""Reading a training workdir: its newest step and what its run never changed."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from llava_jax.convert.tensor import Tensor
from llava_jax.errors import CheckpointError
from llava_jax.models.parameters import Parameters

FROZEN = "frozen"
STEPS = "checkpoints"

# Orbax reports every phase of every save as a warning; what matters comes back as an exception.
logging.getLogger("absl").setLevel(logging.ERROR)


def open_workdir(workdir: str) -> tuple[dict[str, Tensor], int]:
    """All parameters of a workdir's newest step, none read yet, and the step."""
    root = Path(workdir).absolute()
    steps = ocp.utils.checkpoint_steps(root / STEPS) if (root / STEPS).is_dir() else []
    if not steps:
        raise CheckpointError(f"A workdir must hold a saved step; {workdir!r} holds none. Train it first.")
    tensors: dict[str, Tensor] = {}
    with _naming(workdir):
        for path in (root / FROZEN, root / STEPS / str(max(steps)) / "params"):
            if path.exists():
                with ocp.StandardCheckpointer() as checkpointer:
                    leaves = checkpointer.metadata(path).item_metadata.tree
                tensors |= {name: _open_array(workdir, path, name, leaf) for name, leaf in leaves.items()}
    return tensors, max(steps)


def _open_array(workdir: str, path: Path, name: str, leaf: Any) -> Tensor:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)}

    def view() -> np.ndarray:
        args = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        with _naming(workdir), ocp.PyTreeCheckpointer() as checkpointer:
            return np.asarray(checkpointer.restore(path, args=args)[name])

    return Tensor(shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype), origin=f"{path}: {name}", view=view)


def _naming(workdir: str) -> contextlib.AbstractContextManager[None]:
    return named_errors(f"{workdir!r} could not be read", "Train it again or take another folder.")


def restore_tree(path: Path, target: Any) -> Parameters:
    """A saved dictionary in the shapes, dtypes and shardings of `target`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


@contextlib.contextmanager
def named_errors(what: str, remedy: str) -> Iterator[None]:
    """Turns whatever Orbax raises into one error that says which checkpoint it was."""
    try:
        yield
    except Exception as error:  # Orbax raises bare ones where TensorStore finds a damaged file.
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{what}: {reason[:400]}. {remedy}") from error
