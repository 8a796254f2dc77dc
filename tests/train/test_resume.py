"""A run that is killed or asked to stop ends as one that was not: every bit, every step's loss and records."""

import fcntl
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from llava_jax.cli import main
from tests.train.runs import (
    EVERY,
    ROOT,
    STAGES,
    STEPS,
    arrays,
    assert_same_bits,
    command,
    finish,
    saved_steps,
    start,
    story,
    wait,
    wait_for_step,
)

# A run that has recorded more steps may end before the kill comes.
LAST_KILL = STEPS - 3


def _assert_same_run(workdir: Path, reference: Path) -> None:
    assert story(workdir) == story(reference)
    assert [line[0] for line in story(workdir)] == list(range(STEPS))
    assert_same_bits(arrays(workdir, STEPS), arrays(reference, STEPS))
    assert json.loads((workdir / "run.json").read_text())["status"] == "done"


def _kill_and_finish(workdir: Path, cache: Path, config: str, seed: int, num_kills: int) -> int:
    """Kills at random moments of start, compilation, steps and writes; returns how many kills hit a live run."""
    rng = random.Random(seed)
    hits = done = 0
    for number in range(num_kills + 1):
        process = start(workdir, EVERY, cache=cache, config=config)
        if number < num_kills:
            # Lines of the start before count as steps, until this one has found out where it goes on.
            step = done + rng.randrange(1, 4)
            if number % 2 or step > LAST_KILL:
                wait_for_step(workdir, max(done, LAST_KILL) + 1, process, timeout=rng.uniform(0.5, 6.0))
            else:
                wait_for_step(workdir, step, process)
                time.sleep(rng.uniform(0.0, 0.2))
            hits += process.poll() is None
            process.kill()
        result = wait(process)
        resumed = re.search(r"resuming at step (\d+)", result.stdout)
        if "records usable" in result.stdout:
            # A save may have been on its way, and the one before it: no more than two intervals are repeated.
            assert done - (int(resumed[1]) if resumed else 0) <= 2 * int(EVERY.partition("=")[2])
        done = len(story(workdir)) if (workdir / "metrics.jsonl").is_file() else 0
    assert result.returncode == 0, result.stderr
    return hits


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path: Path, reference: Path, cache: Path):
    hits = _kill_and_finish(tmp_path / "run", cache, STAGES["stage2"], seed=0, num_kills=2)
    # The last kill may come after the end of the run.
    assert hits >= 1
    _assert_same_run(tmp_path / "run", reference)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize("stage", STAGES)
def test_often_killed_runs_end_as_if_nothing_had_happened(
    tmp_path: Path, references, cache: Path, stage: str, seed: int
):
    """Eighteen runs, at least 108 kills of a live process."""
    hits = _kill_and_finish(tmp_path / "run", cache, STAGES[stage], seed=seed, num_kills=6)
    assert hits == 6
    _assert_same_run(tmp_path / "run", references(stage))


def _assert_stopped(workdir: Path, result, *, at_least: int) -> int:
    """The exit code, the record and the step are those of a run that saved; returns the step."""
    assert result.returncode == 75, result.stderr
    record = json.loads((workdir / "run.json").read_text())
    (saved,) = saved_steps(workdir)
    assert (record["status"], record["exit_code"], record["step"]) == ("preempted", 75, saved)
    assert at_least <= saved < STEPS
    assert len(story(workdir)) == saved
    assert f"step {saved} of {STEPS}" in result.stderr
    assert "Traceback" not in result.stderr
    return saved


@pytest.mark.parametrize("step", [3, pytest.param(6, marks=pytest.mark.nightly)])
def test_a_run_that_is_asked_to_stop_saves_and_continues(tmp_path: Path, reference: Path, cache: Path, step: int):
    """Asked again and again, as an impatient person or scheduler does."""
    workdir = tmp_path / "run"
    process = start(workdir, "checkpoint_every=100", cache=cache)
    wait_for_step(workdir, step, process)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    result = wait(process, timeout=60)
    assert time.monotonic() - begin < 10
    saved = _assert_stopped(workdir, result, at_least=step)
    assert result.stderr.count("\n") == 1
    result = finish(workdir, EVERY, cache=cache)
    assert result.returncode == 0
    assert f"resuming at step {saved}" in result.stdout
    _assert_same_run(workdir, reference)


@pytest.mark.parametrize("seconds", [2.0, *(pytest.param(s, marks=pytest.mark.nightly) for s in (0.5, 1.0, 3.0, 4.0))])
def test_a_run_that_is_asked_to_stop_while_it_starts_ends_at_once(tmp_path: Path, seconds: float):
    """Without a cache to compile from: the signal comes in imports, measuring or compiling."""
    process = start(tmp_path / "run", EVERY)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    result = wait(process, timeout=60)
    assert time.monotonic() - begin < 10
    assert result.returncode == 75, result.stderr
    assert "run the same command again" in result.stderr
    assert not saved_steps(tmp_path / "run")


@pytest.mark.nightly
def test_workers_that_are_stopped_too_do_not_spoil_the_stop(tmp_path: Path, reference: Path, cache: Path):
    """A scheduler signals the whole process group."""
    workdir = tmp_path / "run"
    process = start(workdir, "checkpoint_every=100", "data.workers=2", cache=cache)
    wait_for_step(workdir, 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    begin = time.monotonic()
    result = wait(process, timeout=60)
    assert time.monotonic() - begin < 10
    _assert_stopped(workdir, result, at_least=2)
    assert result.stderr.count("\n") == 1
    assert finish(workdir, EVERY, cache=cache).returncode == 0
    _assert_same_run(workdir, reference)


def test_a_second_run_is_kept_out_of_a_workdir(reference: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.chdir(ROOT)
    before = (reference / "run.json").read_bytes()
    with (reference / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(reference, EVERY)[3:]) == 74
    assert "one run at a time" in capfd.readouterr().err
    assert (reference / "run.json").read_bytes() == before


def test_a_finished_run_does_nothing_more(reference: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.chdir(ROOT)
    before = arrays(reference, STEPS)
    assert main(command(reference, EVERY)[3:]) == 0, capfd.readouterr().err
    assert_same_bits(arrays(reference, STEPS), before)
    assert len(story(reference)) == STEPS
