"""A run that is killed or asked to stop ends as one that was not: every bit, every step's loss and records."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.train.runs import (
    ROOT,
    STEPS,
    arrays,
    assert_same_bits,
    command,
    environment,
    finish,
    saved_steps,
    start,
    story,
)

EVERY = "checkpoint_every=2"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """One uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "reference"
    result = finish(workdir, EVERY, cache=cache)
    assert result.returncode == 0, result.stderr
    return workdir


def _assert_same_run(workdir: Path, reference: Path) -> None:
    assert story(workdir) == story(reference)
    assert [line[0] for line in story(workdir)] == list(range(STEPS))
    assert_same_bits(arrays(workdir, STEPS), arrays(reference, STEPS))
    assert json.loads((workdir / "run.json").read_text())["status"] == "done"


def _wait_for_step(workdir: Path, step: int, process) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        metrics = workdir / "metrics.jsonl"
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    assert process.poll() is not None, "the run did not reach the step"


def _kill_and_finish(workdir: Path, cache: Path, seed: int, num_kills: int) -> int:
    """Kills at random moments of start, compilation, steps and writes; returns how many kills hit a live run."""
    rng = random.Random(seed)
    hits = 0
    for number in range(num_kills):
        process = start(workdir, EVERY, cache=cache)
        if number % 2:
            time.sleep(rng.uniform(0.5, 6.0))
        else:
            _wait_for_step(workdir, rng.randrange(1, STEPS), process)
            time.sleep(rng.uniform(0.0, 0.3))
        hits += process.poll() is None
        process.kill()
        process.communicate()
    result = finish(workdir, EVERY, cache=cache)
    assert result.returncode == 0, result.stderr
    return hits


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path, reference: Path, cache: Path):
    assert _kill_and_finish(tmp_path / "run", cache, seed=0, num_kills=4) >= 2
    _assert_same_run(tmp_path / "run", reference)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 9))
def test_often_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path, reference: Path, cache: Path, seed: int):
    _kill_and_finish(tmp_path / "run", cache, seed=seed, num_kills=6)
    _assert_same_run(tmp_path / "run", reference)


@pytest.mark.parametrize("step", [3, pytest.param(6, marks=pytest.mark.nightly)])
def test_a_run_that_is_asked_to_stop_saves_and_continues(tmp_path: Path, reference: Path, cache: Path, step: int):
    workdir = tmp_path / "run"
    process = start(workdir, "checkpoint_every=100", cache=cache)
    _wait_for_step(workdir, step, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    record = json.loads((workdir / "run.json").read_text())
    (saved,) = saved_steps(workdir)
    assert record["status"] == "preempted"
    assert record["exit_code"] == 75
    assert record["step"] == saved
    assert step <= saved < STEPS
    assert len(story(workdir)) == saved
    assert err.count("\n") == 1
    assert f"step {saved} of {STEPS}" in err
    assert "Traceback" not in err
    result = finish(workdir, EVERY, cache=cache)
    assert result.returncode == 0
    assert f"resuming at step {saved}" in result.stdout
    _assert_same_run(workdir, reference)


@pytest.mark.nightly
def test_workers_that_are_stopped_too_do_not_spoil_the_stop(tmp_path: Path, reference: Path, cache: Path):
    """A scheduler signals the whole process group."""
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(workdir, "checkpoint_every=100", "data.workers=2"),
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _wait_for_step(workdir, 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert finish(workdir, EVERY, cache=cache).returncode == 0
    _assert_same_run(workdir, reference)


def test_a_finished_run_does_nothing_more(reference: Path, cache: Path):
    before = arrays(reference, STEPS)
    result = finish(reference, EVERY, cache=cache)
    assert result.returncode == 0
    assert_same_bits(arrays(reference, STEPS), before)
    assert len(story(reference)) == STEPS
