"""SIGTERM: heard at any moment, agreed on by all processes, answered with a saved state and exit code 75."""

import contextlib
import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from llava_jax.errors import Preempted, UserError, exit_code
from llava_jax.train import processes
from llava_jax.train.record import RunRecord

QUIT = b"\0"


class Stop:
    """What a thread hears: a SIGTERM, or that another process has ended.

    While a run starts (measuring data, restoring, compiling: minutes in which the main thread may answer nobody)
    there is nothing to save, and the thread itself ends the process. Once steps run, a SIGTERM is a vote that travels
    with the next batch: every process reads the same sum of votes from the same step, so all stop after the same
    one. A process alone need not ask.
    """

    def __init__(self, record: RunRecord):
        self.is_asked = False
        self._record = record
        self._is_starting = True
        self._is_over = False
        self._lock = threading.Lock()
        self._ears, self._mouth = os.pipe()
        os.set_blocking(self._mouth, False)
        self._thread = threading.Thread(target=self._listen, name="stop", daemon=True)

    def start_stepping(self) -> None:
        """Ends the start; returns once every process is ready, and does not return if one of them has ended."""
        votes = [self._vote("go")]
        while processes.are_several() and (len(votes) < processes.count() or "end" in votes):
            # Whoever votes for the end then raises the alarm, which the thread hears.
            time.sleep(processes.pause())
            votes = processes.heard_all("vote")
        with self._lock:
            self._is_starting = False

    def votes(self, mesh: Mesh) -> Int[Array, " devices"]:
        """One vote a device, 1 where this process was asked to stop."""
        mine = np.full(1, int(self.is_asked), np.int32)
        return jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P(mesh.axis_names)), lambda index: mine)

    def is_agreed(self, num_votes: float) -> bool:
        """Whether to stop after this step; `num_votes` is the sum over the devices that a finished step gave."""
        return num_votes > 0 if processes.are_several() else self.is_asked

    def end_process(self, error: UserError) -> NoReturn:
        """Ends this process from a thread, when the main one cannot be waited for; the others hear why."""
        processes.tell("alarm", json.dumps((error.exit_code, str(error))))
        # What holds up the main thread, a disk or a bucket that does not answer, may hold up this one.
        processes.try_for_a_while(lambda: self._record.finish(error))
        print(f"llava-jax: {error}", file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.kill()
        processes.leave(error.exit_code)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hears SIGTERM inside the block; what the block raises is told to the other processes."""
        # Python runs handlers in the main thread, between two of its own instructions; the pipe is written at once.
        pipe = signal.set_wakeup_fd(self._mouth, warn_on_full_buffer=False)
        handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._thread.start()
        try:
            yield
        except BaseException as error:
            with self._lock:
                self._is_over = True
            if not isinstance(error, Preempted):
                self._vote("end")
                processes.tell("alarm", json.dumps((exit_code(error), f"process {processes.index()} ended: {error}")))
            raise
        finally:
            with self._lock:
                self._is_over = True
            os.write(self._mouth, QUIT)
            self._thread.join()
            signal.signal(signal.SIGTERM, handler)
            signal.set_wakeup_fd(pipe)
            os.close(self._ears)
            os.close(self._mouth)

    def _listen(self) -> None:
        while True:
            heard, _, _ = select.select([self._ears], [], [], processes.pause() if processes.are_several() else None)
            signals = os.read(self._ears, 256) if heard else b""
            if QUIT in signals:
                return
            self.is_asked = self.is_asked or signal.SIGTERM in signals
            with self._lock:
                if not self._is_over:
                    self._react()

    def _react(self) -> None:
        alarm = processes.heard("alarm")
        if alarm is not None:
            code, message = json.loads(alarm)
            error = UserError(message)
            error.exit_code = code
            self.end_process(error)
        if self.is_asked and self._is_starting and self._vote("end") == "end":
            self.end_process(
                Preempted("SIGTERM before the first step of this start: nothing to save; run the same command again.")
            )

    def _vote(self, word: str) -> str:
        """Votes once; the vote that counts, which is the first."""
        key = f"vote/{processes.index()}"
        processes.tell(key, word)
        return processes.heard(key) or word
