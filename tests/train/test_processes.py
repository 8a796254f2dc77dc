"""Several processes are one run: the same records and losses, one stop, one record of it."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_jax.errors import UserError
from llava_jax.train import processes
from llava_jax.train.sharding import MeshConfig, make_mesh, process_places
from tests.train.runs import EVERY, STEPS, finish, saved_steps, start_several, story, wait, wait_for_step

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list:
    """What `jax.distributed.initialize` is called with."""
    calls: list = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    yield calls
    jax.config.update("jax_enable_preemption_service", True)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        dict(zip(NAMES, ("host:1", "1", "0"), strict=True)),
    ],
    ids=str,
)
def test_a_process_alone_joins_nothing(joined: list, environment: dict):
    processes.join(environment)
    assert joined == []


@pytest.mark.parametrize(
    ("environment", "arguments"),
    [
        (dict(zip(NAMES, ("host:1", "4", "3"), strict=True)), ("host:1", 4, 3)),
        ({NAMES[0]: "host:1"}, ()),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}, ()),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ()),
    ],
    ids=str,
)
def test_one_of_several_joins_them(joined: list, environment: dict, arguments: tuple):
    processes.join(environment)
    assert joined == [arguments]


@pytest.mark.parametrize(
    ("values", "says"),
    [(("host:1", "2", "2"), "at least 0 and less"), (("host:1", "two", "0"), "'two'"), (("host:1", "2"), NAMES[2])],
)
def test_a_wrong_environment_is_refused(joined: list, values: tuple, says: str):
    with pytest.raises(UserError, match=says):
        processes.join(dict(zip(NAMES, values, strict=False)))


def test_a_process_alone_reads_every_row():
    mesh = make_mesh(MeshConfig())
    np.testing.assert_array_equal(process_places(mesh, 6), np.arange(6))


def _assert_same_story(workdir: Path, reference: Path, steps: range) -> None:
    """The same records in every global batch, and losses within 1e-5."""
    found, expected = story(workdir), story(reference)
    for step in steps:
        assert found[step][0] == step
        assert found[step][3] == expected[step][3]
        assert found[step][1] == pytest.approx(expected[step][1], rel=1e-5)
    assert len(found) == len(steps)


def _assert_all_stopped(workdir: Path, results: list, *, at_least: int) -> int:
    """Every process says the same step, which is saved; returns it."""
    (saved,) = saved_steps(workdir)
    assert at_least <= saved < STEPS
    for result in results:
        assert result.returncode == 75, result.stderr
        assert f"SIGTERM at step {saved} of {STEPS}: saved" in result.stderr
        assert "Traceback" not in result.stderr
    record = json.loads((workdir / "run.json").read_text())
    assert (record["status"], record["step"], record["exit_code"]) == ("preempted", saved, 75)
    return saved


def test_two_processes_stop_together_and_one_goes_on(tmp_path: Path, reference: Path, cache: Path):
    """SIGTERM comes to the second alone; the run then continues on one host, as any reader of it would."""
    workdir = tmp_path / "run"
    running = start_several(workdir, 2, "checkpoint_every=100", cache=cache)
    wait_for_step(workdir, 3, running[0])
    running[1].send_signal(signal.SIGTERM)
    saved = _assert_all_stopped(workdir, [wait(process, timeout=120) for process in running], at_least=3)
    _assert_same_story(workdir, reference, range(saved))
    result = finish(workdir, EVERY, cache=cache)
    assert result.returncode == 0, result.stderr
    assert f"resuming at step {saved}" in result.stdout
    _assert_same_story(workdir, reference, range(STEPS))


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_hosts_and_workers_change_nothing(tmp_path: Path, reference: Path, cache: Path, count: int, workers: int):
    workdir = tmp_path / "run"
    running = start_several(workdir, count, EVERY, f"data.workers={workers}", cache=cache)
    for process in running:
        result = wait(process)
        assert result.returncode == 0, result.stderr
    _assert_same_story(workdir, reference, range(STEPS))


@pytest.mark.nightly
@pytest.mark.parametrize("who", ["first", "all", "groups"])
def test_whoever_is_asked_all_stop_at_one_step(tmp_path: Path, reference: Path, cache: Path, who: str):
    workdir = tmp_path / "run"
    workers = "data.workers=1" if who == "groups" else "data.workers=0"
    running = start_several(workdir, 2, "checkpoint_every=100", workers, cache=cache)
    wait_for_step(workdir, 2, running[0])
    for process in running[:1] if who == "first" else running:
        if who == "groups":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGTERM)
    _assert_all_stopped(workdir, [wait(process, timeout=200) for process in running], at_least=2)
    again = start_several(workdir, 2, EVERY, cache=cache)
    assert [wait(process).returncode for process in again] == [0, 0]
    _assert_same_story(workdir, reference, range(STEPS))


@pytest.mark.nightly
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("seconds", [6.0, 12.0])
def test_a_stop_of_one_while_all_start_ends_all(tmp_path: Path, index: int, seconds: float):
    """Or have just started, on a fast machine: more steps than it could take by then."""
    running = start_several(tmp_path / "run", 2, EVERY, "data.steps=1000")
    time.sleep(seconds)
    running[index].send_signal(signal.SIGTERM)
    results = [wait(process, timeout=60) for process in running]
    for result in results:
        assert result.returncode == 75, result.stderr
        assert ("before the first step" in result.stderr) != bool(saved_steps(tmp_path / "run"))


@pytest.mark.nightly
@pytest.mark.parametrize("rate", ["1e30"])
def test_a_step_that_is_not_finite_ends_all_with_65(tmp_path: Path, cache: Path, rate: str):
    settings = (f"optim.learning_rate={rate}", f"optim.part_learning_rates.projector={rate}", "checkpoint_every=1")
    for process in start_several(tmp_path / "run", 2, *settings, cache=cache):
        result = wait(process)
        assert result.returncode == 65, result.stderr
        assert "must be finite" in result.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exit_code"] == 65


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("override", "says"), [("optim.learning_rate=1e-5", "config and --set values"), ("data.batch_rows=16", "records")]
)
def test_processes_that_differ_are_refused(tmp_path: Path, cache: Path, override: str, says: str):
    """Each would take its own plan for that of all."""
    processes = start_several(tmp_path / "run", 2, EVERY, cache=cache, last=(override,))
    for process in processes:
        result = wait(process)
        assert result.returncode == 2, result.stderr
        assert f"must have the same {says}" in result.stderr


@pytest.mark.nightly
def test_processes_that_open_other_weights_are_refused(tmp_path: Path, reference: Path, cache: Path):
    """One has an older copy of the earlier stage's workdir."""
    older = Path(shutil.copytree(reference, tmp_path / "older"))
    shutil.rmtree(older / "checkpoints" / str(STEPS))
    settings = (EVERY, f"init.projector={reference}")
    last = (f"init.projector={older}",)
    for process in start_several(tmp_path / "run", 2, *settings, cache=cache, last=last):
        result = wait(process)
        assert result.returncode == 2, result.stderr
        assert "must have the same weights in init.projector" in result.stderr
