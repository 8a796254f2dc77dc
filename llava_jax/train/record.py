"""`run.json`: how a run stands, in words, for people and schedulers."""

import json
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from llava_jax.errors import CheckpointError, Preempted, UserError
from llava_jax.train import processes
from llava_jax.train.mirror import Mirror

FILE = "run.json"


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
        code = 0 if error is None else error.exit_code if isinstance(error, UserError) else 70
        status = {0: "done", Preempted.exit_code: "preempted"}.get(code, "failed")
        try:
            self._write(status, code, "" if error is None else str(error))
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
