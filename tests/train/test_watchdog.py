"""A run in which nothing ends any more is ended, and says what every thread was doing."""

import json
import os
import time
from pathlib import Path

import pytest

from llava_jax.data.generated import generate_data
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
    assert not ended


@pytest.mark.nightly
def test_a_picture_that_never_opens_ends_the_run_with_76(tmp_path: Path, cache: Path):
    """A named pipe without a writer takes the place of every picture: reading waits for ever, as on a dead disk."""
    data = tmp_path / "data"
    generate_data(data, num_records=64, image_size=16, seed=0)
    settings = (f"data.records={data / 'records.json'}", f"data.image_root={data / 'pictures'}")
    process = start(tmp_path / "run", "data.steps=2000", "life.stall_seconds=5", *settings, cache=cache)
    wait_for_step(tmp_path / "run", 3, process)
    for picture in (data / "pictures").iterdir():
        picture.unlink()
        os.mkfifo(picture)
    result = wait(process, timeout=120)
    assert result.returncode == 76, result.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 76)
    assert "read_batches" in (tmp_path / "run" / "stacks-0.txt").read_text()
