"""A run in which nothing ends any more is ended, and says what every thread was doing."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest

from llava_jax.train import processes
from llava_jax.train.watchdog import Watchdog
from tests.train.runs import start, wait, wait_for_step


def _doze(seconds: float) -> None:
    time.sleep(seconds)


def test_silence_ends_a_run_and_leaves_its_stacks(tmp_path: Path, capfd):
    ended: list = []
    with Watchdog(0.2, str(tmp_path), ended.append) as watchdog:
        watchdog.beat()
        _doze(1.0)
    assert len(ended) == 1  # once, however long the process takes to end
    assert ended[0].exit_code == 76
    assert "life.stall_seconds=0.2" in str(ended[0])
    assert "_doze" in (tmp_path / "stacks-0.txt").read_text()
    assert "_doze" in capfd.readouterr().err


def test_a_disk_that_does_not_answer_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pipe that nobody reads takes the place of the file for the stacks: opening it waits for ever."""
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    os.mkfifo(tmp_path / "stacks-0.txt")
    ended: list = []
    with Watchdog(0.2, str(tmp_path), ended.append) as watchdog:
        watchdog.beat()
        _doze(1.5)
    assert len(ended) == 1


def test_signs_of_life_keep_it_quiet_and_compiling_may_take_long(tmp_path: Path):
    ended: list = []
    with Watchdog(0.5, str(tmp_path), ended.append) as watchdog:
        time.sleep(1.0)
        for _ in range(10):
            watchdog.beat()
            time.sleep(0.1)
        with watchdog.paused():
            time.sleep(1.0)
    assert not ended


def test_a_save_may_take_longer_than_a_step(tmp_path: Path):
    ended: list = []
    with Watchdog(0.2, str(tmp_path), ended.append) as watchdog:
        watchdog.beat()
        with watchdog.patient(2.0):
            time.sleep(1.0)
        assert not ended
        with watchdog.patient(0.5):
            time.sleep(1.5)
    assert len(ended) == 1


def test_after_a_pause_it_watches_again(tmp_path: Path):
    ended: list = []
    with Watchdog(0.2, str(tmp_path), ended.append) as watchdog:
        with watchdog.paused():
            pass
        time.sleep(1.0)
    assert len(ended) == 1


@pytest.mark.nightly
@pytest.mark.parametrize("is_first_batch", [True, False])
def test_data_that_comes_no_more_ends_the_run_with_76(tmp_path: Path, cache: Path, is_first_batch: bool):
    """The worker that reads is stopped, as a dead disk would stop it: before the first batch, or when steps run."""
    run = tmp_path / "run"
    process = start(run, "data.steps=2000", "data.workers=1", "life.stall_seconds=20", cache=cache)
    if not is_first_batch:
        wait_for_step(run, 3, process)
    deadline = time.monotonic() + 120
    while not (workers := _readers(process.pid)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    while process.poll() is None and time.monotonic() < deadline + 60:
        time.sleep(0.1)
    for worker in workers:
        # One that was still starting is not yet among those that the run kills.
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    result = wait(process, timeout=60)
    assert result.returncode == 76, result.stderr
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 76)
    assert "read_batches" in (run / "stacks-0.txt").read_text()


def _readers(parent: int) -> list[int]:
    """Processes that Grain has started for reading."""
    children = [child for path in Path(f"/proc/{parent}/task").glob("*/children") for child in path.read_text().split()]
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
