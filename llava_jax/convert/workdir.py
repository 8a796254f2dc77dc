"""Reading a training workdir: its newest good step and what its run never changed."""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llava_jax.convert.checkpoint import Run
from llava_jax.convert.fields import read_object
from llava_jax.convert.integrity import Damaged, compare, digest, fingerprints
from llava_jax.convert.tensor import Tensor
from llava_jax.errors import CheckpointError
from llava_jax.models.lora import A, B, LoraConfig, is_adapter, merged
from llava_jax.models.quantized import ABSMAX, CODES, dequantize, is_quantized, kernel_shape

# In a folder or in a bucket.
AnyPath = Path | epath.Path

FROZEN = "frozen"
STEPS = "checkpoints"
EMBEDDING = "decoder.embed_tokens.embedding"
# Small arrays are read together, so many bytes at a time.
GROUP_BYTES = 64 * 2**20
# The resolved config of a run, flat.
CONFIG = "config.json"

# Orbax reports every phase of every save as a warning, and the stack of every failed one from each of its threads;
# what matters comes back as an exception.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def open_workdir(workdir: str, *, step: int | None = None) -> tuple[dict[str, Tensor], Run]:
    """All parameters of a workdir at its newest step that is not damaged, or at `step`, and what the run did.

    Every array is read once here and compared with its fingerprint; none is kept.

    Raises:
      CheckpointError: no such step is there, or it (if one was named: it alone) is damaged.
    """
    root = Path(workdir).absolute()
    steps = sorted(saved_steps(root), reverse=True)
    if not steps:
        raise CheckpointError(f"A workdir must hold a saved step; {workdir!r} holds none. Train it first.")
    if step is not None and step not in steps:
        raise CheckpointError(f"{workdir!r} holds the steps {', '.join(map(str, steps[::-1]))}; got {step}.")
    for candidate in steps if step is None else [step]:
        folder = root / STEPS / str(candidate)
        try:
            record = read_record(folder)
            saved = _SavedTree.open(workdir, folder / "params")
            compare(saved.fingerprints(), record["params"], f"step {candidate} of {workdir}")
        except Damaged as error:
            if step is not None or candidate == steps[-1]:
                raise CheckpointError(f"{error} Take another step or folder, or train it again.") from error
            print(f"llava-jax: {error} Taking the step before.", file=sys.stderr, flush=True)
            continue
        trained, frozen = saved.tensors(), {}
        if record["frozen"]:
            kept = _SavedTree.open(workdir, root / FROZEN)
            compare_frozen(kept.fingerprints(), record["frozen"], root / FROZEN)
            frozen = kept.tensors()
        run = _run(root, candidate, trained)
        return _plain(frozen | trained, run.lora), run
    raise AssertionError("unreachable: the last candidate returns or raises")


@dataclasses.dataclass(frozen=True)
class _SavedTree:
    """A saved dictionary of arrays, none of them read yet."""

    workdir: str
    path: Path
    leaves: Mapping[str, jax.ShapeDtypeStruct]

    @classmethod
    def open(cls, workdir: str, path: Path) -> "_SavedTree":
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        with _naming(workdir):
            shapes = tree_shapes(path).items()
        return cls(workdir, path, {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for n, x in shapes})

    def read(self, *names: str) -> dict[str, jax.Array]:
        target = {name: self.leaves[name] for name in names}
        args = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        with _naming(self.workdir), ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(self.path, args=args)

    def fingerprints(self) -> dict[str, str]:
        """Of every array, each read once and none kept; many small ones at a time, as every reading costs its own."""
        ends = itertools.accumulate(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self.leaves.values())
        groups = itertools.groupby(zip(self.leaves, ends, strict=True), key=lambda place: place[1] // GROUP_BYTES)
        found: dict[str, str] = {}
        for _, places in groups:
            found |= fingerprints(self.read(*(name for name, _ in places)))
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Each is read when it is looked at."""
        return {name: self._tensor(name, leaf) for name, leaf in self.leaves.items()}

    def _tensor(self, name: str, leaf: jax.ShapeDtypeStruct) -> Tensor:
        return Tensor(
            shape=leaf.shape,
            dtype=np.dtype(leaf.dtype),
            origin=f"{self.path}: {name}",
            view=lambda: np.asarray(self.read(name)[name]),
        )


def _naming(workdir: str) -> contextlib.AbstractContextManager[None]:
    return named_errors(f"{workdir!r} could not be read", "Put it back from a copy.", Damaged)


def saved_steps(root: Path) -> list[int]:
    """Steps that were completely written."""
    return list(ocp.utils.checkpoint_steps(root / STEPS)) if (root / STEPS).is_dir() else []


def read_record(step_folder: AnyPath) -> dict[str, Any]:
    """The integrity record of a step: fingerprints of its arrays and the frozen ones, digest of its position."""
    what = f"step {step_folder.name} of {step_folder.parent}"
    try:
        record = json.loads((step_folder / "integrity" / "metadata").read_text())
        stated = record.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{what} must hold a readable integrity record: {error}.") from error
    if digest(record) != stated:
        raise Damaged(f"{what} is damaged: its integrity record differs from what was saved.")
    return record


def compare_frozen(found: dict[str, str], saved: dict[str, str], folder: AnyPath) -> None:
    """As `compare`, for the one copy of what a run never changes: there is no older one to fall back to."""
    try:
        compare(found, saved, str(folder))
    except Damaged as error:
        raise CheckpointError(
            f"{error} It is the only copy. Put the folder back from a backup, or start in another --workdir "
            "from the same init."
        ) from error


def tree_shapes(path: AnyPath) -> dict[str, Any]:
    """What a saved dictionary holds: anything with `shape` and `dtype` by name."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(path).item_metadata.tree


def _run(workdir: Path, step: int, trained: dict[str, Tensor]) -> Run:
    config = read_object(workdir / CONFIG) if (workdir / CONFIG).is_file() else {}
    init = {name.removeprefix("init."): value for name, value in config.items() if name.startswith("init.")}
    lora = None
    if any(map(is_adapter, trained)):
        try:
            lora = LoraConfig(**{field.name: config[f"lora.{field.name}"] for field in dataclasses.fields(LoraConfig)})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{workdir / CONFIG} must say how the run's adapters add up: {error}. Put the run's own file back."
            ) from error
    return Run(step=step, trained=trained, lora=lora, init=init)


def _plain(tensors: Mapping[str, Tensor], lora: LoraConfig | None) -> dict[str, Tensor]:
    """A run's parameters as those of its plain model, computed as each is read: quantized kernels made whole again,
    adapters, if it trained any, added. Such a kernel gets the dtype of the embedding, which was kept as it was found.
    """
    plain = {name: tensor for name, tensor in tensors.items() if not is_adapter(name) and not is_quantized(name)}
    for name in tensors:
        if name.endswith(CODES):
            stem = name.removesuffix(CODES)
            halves = (tensors[name], tensors[stem + ABSMAX])
            plain[f"{stem}.kernel"] = Tensor(
                shape=kernel_shape(tensors[name]),
                dtype=tensors[EMBEDDING].dtype,
                origin=tensors[name].origin,
                view=functools.partial(_whole, *halves),
            )

    def view(kernel: Tensor, *adapter: Tensor) -> np.ndarray:
        names = ("x.kernel", "x" + A, "x" + B)
        values = {name: tensor.view() for name, tensor in zip(names, (kernel, *adapter), strict=False)}
        return merged(values, lora.scale if lora else 0.0)["x.kernel"].astype(kernel.dtype)

    for name, kernel in plain.items():
        stem = name.removesuffix(".kernel")
        adapter = [tensors[stem + end] for end in (A, B) if stem + end in tensors]
        if adapter or stem + CODES in tensors:
            plain[name] = dataclasses.replace(kernel, view=functools.partial(view, kernel, *adapter))
    return plain


def _whole(codes: Tensor, absmax: Tensor) -> np.ndarray:
    """A quantized kernel in float32, so that it is rounded after an adapter was added, once."""
    return np.asarray(dequantize(jnp.asarray(codes.view()), jnp.asarray(absmax.view()), jnp.float32))


def restore_tree(path: AnyPath, target: Any) -> Any:
    """A saved tree in the shapes, dtypes and shardings of `target`.

    Unlike a checkpointer's, this waits for no other process in the end: one whose share is damaged never gets there.
    """
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.restore(epath.Path(path), args=ocp.args.StandardRestore(target))


@contextlib.contextmanager
def named_errors(what: str, remedy: str, kind: type[CheckpointError] = CheckpointError) -> Iterator[None]:
    """Turns whatever Orbax raises into one error that says which checkpoint it was."""
    try:
        yield
    except Exception as error:  # Orbax raises bare ones where TensorStore finds a damaged file.
        reason = " ".join(str(error).split())
        raise kind(f"{what}: {reason[:400]}. {remedy}") from error
