"""Worker processes: how a question is put to every record by many of them, and how they end with the run."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing import connection, sharedctypes, synchronize
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

# Records that a worker is given at a time.
CHUNK = 256
# Fewer records than these are asked about sooner than workers start.
MIN_RECORDS = 4096

# Ends a worker. Schedulers send SIGUSR1 and SIGUSR2 for purposes of their own; macOS has no others to spare.
END = signal.SIGRTMIN + 1 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2
# Seconds that a worker has to obey.
PATIENCE = 5.0

T = TypeVar("T")
_ask: Callable[[int], Any] | None = None


def ask_all(ask: Callable[[int], T], num_records: int, *, label: str, num_workers: int | None = None) -> Iterator[T]:
    """`ask(0)`, `ask(1)`, ... in this order, whatever the number of processes; None chooses it, 0 is this one alone.

    Raises:
      Exception: whatever `ask` raises.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if num_records >= MIN_RECORDS else 0
    bar = tqdm(total=num_records, desc=label, unit="record", disable=None, leave=False)
    with contextlib.closing(bar):
        if num_workers < 1:
            for record in range(num_records):
                yield ask(record)
                bar.update()
            return
        chunks = [range(at, min(at + CHUNK, num_records)) for at in range(0, num_records, CHUNK)]
        # Spawned: a process that has started JAX must not be forked.
        pool = concurrent.futures.ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start, (ask,))
        try:
            for answers in pool.map(_ask_chunk, chunks):
                yield from answers
                bar.update(len(answers))
        finally:
            pool.shutdown(cancel_futures=True)


def _start(ask: Callable[[int], Any]) -> None:
    global _ask
    _ask = ask
    follow_the_parent_alone()


def _ask_chunk(chunk: range) -> list[Any]:
    assert _ask is not None, "the pool's initializer sets it"
    return [_ask(record) for record in chunk]


def follow_the_parent_alone() -> None:
    """Runs in a worker: it ends with the run, and does not listen to a scheduler that signals the whole group.

    A run that is asked to stop still needs its next batches.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(END, _end_unless_locking)
    threading.Thread(target=_end_with_the_parent, name="parent", daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def end_workers(workers: Collection[BaseProcess]) -> None:
    """Ends processes that `follow_the_parent_alone`, whatever they are at, but not while they hold a lock.

    Who asks for a lock that a process took and died with waits for ever. What counts are events, conditions and numbers
    that processes share; a worker whose place in the data is set from outside (Grain's `set_state`) would take more.
    """
    # A sentinel says that its process has ended, even where the launcher ignores SIGCHLD and `is_alive` does not know.
    alive = {worker.sentinel: worker for worker in workers}
    late = time.monotonic() + PATIENCE
    while alive and time.monotonic() < late:
        for worker in alive.values():
            if worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, END)
        ended = connection.wait(list(alive), timeout=0.02)
        alive = {sentinel: worker for sentinel, worker in alive.items() if sentinel not in ended}
    # These hang in calls outside Python.
    for worker in alive.values():
        worker.kill()


def _end_unless_locking(signum: int, frame: FrameType | None) -> None:
    """Python calls this between two instructions of the main thread; `end_workers` asks until it suits."""
    del signum
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), _LOCKING):
            return
        frame = frame.f_back
    os._exit(1)


_LOCKING = (synchronize.Event, synchronize.Condition, synchronize.SemLock, sharedctypes.SynchronizedBase)
