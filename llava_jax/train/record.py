"""`run.json`: how a run stands, in words, for people and schedulers."""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from llava_jax.errors import CheckpointError, Preempted, exit_code
from llava_jax.train import processes
from llava_jax.train.mirror import Mirror

FILE = "run.json"

# A disk or quota is full, or the folder cannot be written any more.
SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def named_shortage(workdir: str) -> Iterator[None]:
    """Turns what the system says of a full disk, whichever file of a run met it, into one error with a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in SHORTAGES:
            raise
        raise CheckpointError(
            f"The workdir must have room for what a run writes; in {workdir!r}: {error}. Free space and run the same "
            "command again; saved steps are intact."
        ) from error


class RunRecord:
    """Writes the status of a workdir: running, then done, preempted or failed, with the exit code.

    Of several processes, the first one writes.
    """

    def __init__(self, mirror: Mirror):
        self._mirror = mirror
        self._path = Path(mirror.folder, FILE)
        self.step = 0
        self.num_steps = 0
        # Of this start, by bucket; see train/goodput.py.
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> "RunRecord":
        self._write("running", None, "")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, traceback
        self.finish(error)

    def finish(self, error: BaseException | None) -> None:
        """Says how the run ended, if it still can: what ended it may be that nothing can be written any more."""
        code = exit_code(error)
        status = {0: "done", Preempted.exit_code: "preempted"}.get(code, "failed")
        message = "" if error is None else str(error) or type(error).__name__
        try:
            self._write(status, code, message)
        except (OSError, CheckpointError) as failure:
            print(f"llava-jax: {FILE} could not be written ({failure}).", file=sys.stderr, flush=True)

    def _write(self, status: str, exit_code: int | None, message: str) -> None:
        content = {
            "status": status,
            "step": self.step,
            "num_steps": self.num_steps,
            "exit_code": exit_code,
            "message": message,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if processes.is_first():
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content, indent=2) + "\n")
            os.replace(temporary, self._path)
        self._mirror.carry()
