"""The watchdog: ends a run in which no step ends any more, and leaves the stacks of all threads."""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from llava_jax.errors import Stalled, UserError
from llava_jax.train import processes


class Watchdog:
    """A thread that waits for signs of life, from the first batch on; compiling may take as long as it takes.

    A host that hangs in reading holds up all the others in their next step, so every process ends by its own watch.
    """

    def __init__(self, seconds: float, workdir: str, end_process: Callable[[UserError], NoReturn]):
        self._seconds, self._end_process = seconds, end_process
        self._stacks = Path(workdir, f"stacks-{processes.index()}.txt")
        self._last: float | None = None
        self._more = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """A sign of life."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Expects no sign of life inside the block."""
        self._last = None
        yield
        self.beat()

    @contextlib.contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Waits so much longer for a sign of life inside the block."""
        self._more = seconds
        yield
        self._more = 0.0
        self.beat()

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()

    def _leave_stacks(self) -> None:
        with contextlib.suppress(OSError), self._stacks.open("w") as file:
            faulthandler.dump_traceback(file)

    def _watch(self) -> None:
        while not self._is_over.wait(min(1.0, self._seconds / 4)):
            silence = 0.0 if self._last is None else time.monotonic() - self._last
            if silence > self._seconds + self._more:
                faulthandler.dump_traceback(sys.stderr)
                processes.try_for_a_while(self._leave_stacks)
                self._end_process(
                    Stalled(
                        f"A step must end within life.stall_seconds={self._seconds:g}; none did for {silence:.0f} "
                        f"seconds. What every thread did is in {self._stacks}. Run the same command again."
                    )
                )
                # Only a test's stand-in comes back.
                break
