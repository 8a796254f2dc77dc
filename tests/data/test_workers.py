"""Workers end when they are told to, whatever they are at, and leave no lock behind."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from typing import Any

import pytest

from llava_jax.data.workers import PATIENCE, end_workers, follow_the_parent_alone

SPAWN = multiprocessing.get_context("spawn")


def _ask_for_ever(stop: Event, number: Any) -> None:
    """As a worker of Grain between two rows, only much oftener."""
    follow_the_parent_alone()
    number.value = 1
    while not stop.is_set():
        assert number.value == 1
        sum(range(100))


def _sleep(stop: Event, number: Any) -> None:
    follow_the_parent_alone()
    number.value = 1
    time.sleep(600)


@pytest.mark.parametrize("task", [_ask_for_ever, _sleep])
def test_a_worker_that_is_ended_keeps_no_lock(task: Callable[[Event, Any], None]):
    # Killed at once, some of those that ask for ever keep one of the two.
    shared = [(SPAWN.Event(), SPAWN.Value("i", 0)) for _ in range(6)]
    workers = [SPAWN.Process(target=task, args=pair, daemon=True) for pair in shared]
    for worker in workers:
        worker.start()
    for (_, number), worker in zip(shared, workers, strict=True):
        while number.value == 0:
            assert worker.is_alive()
            time.sleep(0.01)
    begin = time.monotonic()
    end_workers(workers)
    assert time.monotonic() - begin < PATIENCE
    for stop, number in shared:
        assert number.get_lock().acquire(timeout=1)
        assert stop._cond.acquire(timeout=1)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_worker_that_has_only_begun_ends():
    worker = SPAWN.Process(target=_sleep, args=(SPAWN.Event(), SPAWN.Value("i", 0)), daemon=True)
    worker.start()
    end_workers([worker])
    worker.join(1)
    assert worker.exitcode is not None
