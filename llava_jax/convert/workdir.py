"""Reading a training workdir: its newest step and what its run never changed."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llava_jax.errors import CheckpointError
from llava_jax.models.lora import is_adapter, merged
from llava_jax.models.parameters import Parameters

FROZEN = "frozen"
STEPS = "checkpoints"
# The resolved config of a run, flat.
CONFIG = "config.json"

# Orbax reports every phase of every save as a warning; what matters comes back as an exception.
logging.getLogger("absl").setLevel(logging.ERROR)


def read_workdir(workdir: str) -> Parameters:
    """All parameters of a workdir's newest step, on this host's first device; adapters are merged."""
    root = Path(workdir).absolute()
    step = ocp.utils.checkpoint_steps(root / STEPS) if (root / STEPS).is_dir() else []
    if not step:
        raise CheckpointError(f"A workdir must hold a saved step; {workdir!r} holds none. Train it first.")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    values: Parameters = {}
    with named_errors(f"{workdir!r} could not be read", "Train it again or take another folder."):
        for path in (root / FROZEN, root / STEPS / str(max(step)) / "params"):
            if path.exists():
                with ocp.StandardCheckpointer() as checkpointer:
                    shapes = checkpointer.metadata(path).item_metadata.tree
                target = {
                    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here) for name, leaf in shapes.items()
                }
                values |= restore_tree(path, target)
    return merge_adapters(values, root)


def merge_adapters(values: Parameters, workdir: Path) -> Parameters:
    """A run's parameters as those of its plain model; they come back as they are where it trained no adapters."""
    if not any(map(is_adapter, values)):
        return values
    config = json.loads((workdir / CONFIG).read_text())
    return merged(values, config["lora.alpha"] / config["lora.rank"])


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
