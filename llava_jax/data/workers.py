"""Worker processes: how a question is put to every record by many of them, and how they end with the run."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, sharedctypes, synchronize
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

from tqdm import tqdm

# Records that a worker is given at a time.
CHUNK = 256
# Fewer records than these are asked about sooner than workers start.
MIN_RECORDS = 4096

# Ends a worker; no scheduler sends it.
END = signal.SIGRTMIN + 1
# Seconds that a worker has to obey.
PATIENCE = 3.0

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


def end_workers(workers: Iterable[BaseProcess]) -> None:
    """Ends processes that `follow_the_parent_alone`, whatever they are at, and leaves every lock shared with them free.

    A process that is killed while it holds a lock keeps it: who asks for it next waits for ever.
    """
    late = time.monotonic() + PATIENCE
    while alive := [worker for worker in workers if worker.is_alive()]:
        for worker in alive:
            if time.monotonic() > late:
                # It is stuck in a call that is not Python's, where no lock is taken.
                worker.kill()
            elif worker.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, END)
        connection.wait([worker.sentinel for worker in alive], timeout=0.02)


def _end_unless_locking(signum: int, frame: FrameType | None) -> None:
    """Python calls this between two instructions of the main thread; `end_workers` asks until it suits."""
    del signum
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), _LOCKING):
            return
        frame = frame.f_back
    os._exit(1)


# What takes a lock that processes share: events and conditions, numbers, and the locks themselves.
_LOCKING = (synchronize.Event, synchronize.Condition, synchronize.SemLock, sharedctypes.SynchronizedBase)
