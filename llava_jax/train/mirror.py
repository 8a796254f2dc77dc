"""Where a run's small files lie: in the workdir, or for one in a bucket in a local folder that is carried there."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from llava_jax.convert.workdir import AnyPath, named_errors
from llava_jax.errors import CheckpointError, UserError
from llava_jax.train import processes

BUCKET = "gs://"
# What a continued run reads; the rest is written anew, or by Orbax.
READ_BACK = ("config.json", "metrics.jsonl", "wandb_id", "cache")
# What every run leaves, and what it would write over.
OWN, WRITTEN = ("run.json", "checkpoints"), ("config.json", "model.json", "tokenizer", "metrics.jsonl")


class Mirror:
    """A folder for files that are locked, mapped, or written line by line: a bucket knows none of that.

    `folder` is the workdir itself, if that is a folder. Otherwise it is a temporary one: what a continued run reads
    comes from the bucket, and what has changed goes there with every saved step and when the run ends. The bucket is
    the only truth; nothing is lost with the folder but lines of steps that were not saved either.
    """

    def __init__(self, folder: str, workdir: str):
        self.folder, self.workdir = folder, workdir
        self._carried: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    @property
    def is_remote(self) -> bool:
        return self.folder != self.workdir

    def fetch(self) -> None:
        """Brings what a continued run reads, as another process or start has left it."""
        if not self.is_remote:
            return
        from etils import epath

        with named_errors(f"{self.workdir} could not be read", "Check its name and your credentials."):
            root = epath.Path(self.workdir)
            for name in READ_BACK:
                source = root / name
                for file in source.iterdir() if source.is_dir() else [source] if source.exists() else []:
                    target = Path(self.folder, file.relative_to(root))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
                    self._carried[str(target)] = _look(target)

    def carry(self) -> None:
        """Writes to the bucket every file that has changed since it was carried or fetched."""
        if not self.is_remote:
            return
        from etils import epath

        with self._lock, named_errors(f"{self.workdir} could not be written", "Older steps are intact."):
            for path in sorted(Path(self.folder).rglob("*")):
                # Others write here too: a file may be gone by now, or a link lead nowhere.
                if not path.is_file() or path.suffix == ".tmp":
                    continue
                look = _look(path)
                if self._carried.get(str(path)) != look:
                    (epath.Path(self.workdir) / str(path.relative_to(self.folder))).write_bytes(path.read_bytes())
                    self._carried[str(path)] = look


def move(source: AnyPath, target: AnyPath) -> None:
    """Moves a folder; one of a bucket object by object, as a bucket has no folders, without reading them here."""
    if not is_remote(str(source)):
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
        return
    import fsspec

    files = fsspec.filesystem("gs", use_listings_cache=False, skip_instance_cache=True)
    names = files.find(str(source))
    root = str(source).removeprefix(BUCKET)
    files.copy(names, [f"{target}{name.removeprefix(root)}" for name in names])
    files.rm(names)


@contextlib.contextmanager
def mirrored(workdir: str) -> Iterator[Mirror]:
    """The mirror of a workdir, which is made if it is not there.

    Raises:
      UserError: this kind of address is unknown, or the packages for it are not installed.
      CheckpointError: it cannot be read or written, or holds somebody else's files.
    """
    if not workdir:
        raise UserError("--workdir must name a folder; got ''.")
    if not is_remote(workdir):
        if "://" in workdir:
            raise UserError(f"--workdir must be a folder or {BUCKET}BUCKET/NAME; got {workdir!r}.")
        make_folder(workdir)
        _check_own(Path(workdir))
        yield Mirror(workdir, workdir)
        return
    if find_spec("gcsfs") is None:
        raise UserError(f"A workdir on {BUCKET} needs one more package. Run pip install -e '.[gcs]'.")
    from etils import epath
    from fsspec import config

    # TensorStore writes beside gcsfs, whose memory of what is in a folder would be wrong.
    config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    with tempfile.TemporaryDirectory(prefix="llava_jax_") as folder:
        mirror = Mirror(folder, workdir.rstrip("/"))
        with named_errors(f"{workdir} could not be read", "Check its name and your credentials."):
            _check_own(epath.Path(workdir))
        mirror.fetch()
        yield mirror


def _check_own(workdir: AnyPath) -> None:
    """Refuses a folder of another kind, such as a model's, whose files a run would write over."""
    if processes.is_first() and not any((workdir / name).exists() for name in OWN):
        for name in WRITTEN:
            if (workdir / name).exists():
                raise CheckpointError(
                    f"--workdir must be new or hold a run; {str(workdir)!r} has a {name} and no {OWN[0]}. Name another."
                )


def make_folder(workdir: str) -> None:
    """Makes a local workdir; raises `CheckpointError` if that cannot be."""
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"--workdir must be a folder that can be written; got {workdir!r}: {error}. Name another."
        ) from None


def is_remote(workdir: str) -> bool:
    return workdir.startswith(BUCKET)


def _look(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size
