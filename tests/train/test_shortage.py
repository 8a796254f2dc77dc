"""A disk that is full ends a run with 74 and one line; what was saved before is intact, and the run goes on later."""

import json
import resource
import signal
from pathlib import Path

import pytest

from tests.train.runs import EVERY, arrays, assert_same_bits, finish, saved_steps, start, story, wait, wait_for_step


def _assert_one_line(result, workdir: Path) -> None:
    assert result.returncode == 74, result.stderr
    *before, last = result.stderr.strip().splitlines()
    assert last.startswith("llava-jax: ")
    # TensorStore prints traces of its own when Orbax no longer waits for what it could not write.
    assert not any("llava_jax" in line for line in before)
    lines = [line for line in result.stderr.splitlines() if line.startswith("llava-jax: ")]
    assert len(lines) == 1, result.stderr
    assert "Free space" in lines[0]
    record = json.loads((workdir / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", 74)


# The limit of a file's size stands for a full disk: arrays do not fit any more, or not even a line of the metrics.
@pytest.mark.parametrize("limit", [60_000, pytest.param(1_000, marks=pytest.mark.nightly)])
def test_a_full_disk_ends_a_run_and_harms_nothing(tmp_path: Path, reference: Path, cache: Path, limit: int):
    workdir = tmp_path / "run"
    process = start(workdir, EVERY, cache=cache)
    wait_for_step(workdir, 5, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _assert_one_line(wait(process), workdir)
    assert saved_steps(workdir)
    assert finish(workdir, EVERY, cache=cache).returncode == 0
    assert story(workdir) == story(reference)
    assert_same_bits(arrays(workdir), arrays(reference))


@pytest.mark.nightly
def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path: Path, cache: Path):
    process = start(tmp_path / "run", EVERY, cache=cache)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    _assert_one_line(wait(process), tmp_path / "run")


def test_a_disk_without_room_for_a_single_line_is_one_line(tmp_path: Path, reference: Path):
    """The config's data are there already, as the reference has made them."""
    process = start(tmp_path / "run", EVERY)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100, 100))
    result = wait(process)
    assert result.returncode == 74, result.stderr
    assert "Traceback" not in result.stderr
    assert "Free space" in result.stderr


@pytest.mark.nightly
def test_an_interrupted_run_says_so(tmp_path: Path, cache: Path):
    """Ctrl-C saves nothing: the steps since the last save are repeated."""
    process = start(tmp_path / "run", EVERY, "data.steps=1000", cache=cache)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGINT)
    assert wait(process).returncode == 130
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exit_code"] == 130


@pytest.mark.nightly
def test_a_killed_process_ends_the_other(tmp_path: Path, reference: Path, cache: Path):
    """The other cannot go on: it ends by itself, and the run continues when both are started again."""
    from tests.train.runs import start_several

    workdir = tmp_path / "run"
    running = start_several(workdir, 2, EVERY, cache=cache)
    wait_for_step(workdir, 3, running[0])
    running[1].kill()
    assert wait(running[0], timeout=300).returncode not in (0, 75)
    for process in start_several(workdir, 2, EVERY, cache=cache):
        result = wait(process)
        assert result.returncode == 0, result.stderr
    assert [line[3] for line in story(workdir)] == [line[3] for line in story(reference)]
