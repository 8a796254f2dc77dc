"""One run at a time in a workdir."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from llava_jax.errors import CheckpointError
from llava_jax.train import processes
from llava_jax.train.mirror import Mirror


@contextlib.contextmanager
def only_run(mirror: Mirror) -> Iterator[None]:
    """Holds the workdir against a second run; the kernel lets go when the process ends, however it does.

    Of several processes, the first one holds it for all. A bucket cannot be held.
    """
    if not processes.is_first():
        yield
        return
    workdir = mirror.folder
    if mirror.is_remote:
        print(f"{mirror.workdir} cannot be locked (it is a bucket): take care to start one run alone.", flush=True)
        yield
        return
    path = Path(workdir, "lock")
    try:
        path.touch()
    except OSError as error:
        raise CheckpointError(f"--workdir must be a folder that can be written; got {workdir!r}: {error}.") from None
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"A workdir takes one run at a time; another one is running in {workdir!r}. Wait for it, stop it, "
                "or choose another --workdir."
            ) from None
        except OSError as error:
            # Some network file systems know no locks.
            print(f"{workdir} cannot be locked ({error.strerror}): take care to start one run alone.", flush=True)
        yield
