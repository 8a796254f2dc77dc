"""A workdir in a bucket: the run goes on from there after a kill, and what it leaves is what any run leaves."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from llava_jax.cli import main
from llava_jax.convert.workdir import open_workdir
from tests.train.bucket import Bucket
from tests.train.runs import (
    EVERY,
    ROOT,
    STEPS,
    arrays,
    assert_same_bits,
    command,
    finish,
    start,
    start_several,
    story,
    wait,
)

URL = "gs://bucket/runs/one"
UNDER = "runs/one/"


@pytest.fixture
def bucket():
    with Bucket() as bucket:
        yield bucket


def _wait_for(bucket: Bucket, name: str, process) -> None:
    """Returns when an object is there, or the run has ended."""
    deadline = time.monotonic() + 600
    while UNDER + name not in bucket.objects and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert UNDER + name in bucket.objects, name


def _copy(bucket: Bucket, folder: Path) -> Path:
    """The workdir as `gcloud storage cp --recursive` would bring it."""
    for name in bucket.names(UNDER):
        if not name.endswith("/"):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(bucket.objects[UNDER + name][0])
    return folder


def _assert_same_run(copy: Path, reference: Path) -> None:
    assert story(copy) == story(reference)
    assert_same_bits(arrays(copy, STEPS), arrays(reference, STEPS))
    assert json.loads((copy / "run.json").read_text())["status"] == "done"


@pytest.mark.nightly
def test_a_killed_run_goes_on_from_its_bucket(tmp_path: Path, reference: Path, cache: Path, bucket: Bucket):
    process = start(URL, EVERY, cache=cache, **bucket.environment)
    _wait_for(bucket, "checkpoints/4/commit_success.txt", process)
    process.kill()
    wait(process)
    result = finish(URL, EVERY, cache=cache, **bucket.environment)
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stdout
    assert "cannot be locked" in result.stdout
    copy = _copy(bucket, tmp_path / "copy")
    _assert_same_run(copy, reference)
    values, run = open_workdir(str(copy))
    assert run.step == STEPS
    expected = open_workdir(str(reference))[0]
    assert all(np.array_equal(values[name].view(), expected[name].view()) for name in expected)


@pytest.mark.nightly
@pytest.mark.parametrize("step", range(2, STEPS, 2))
def test_a_save_that_is_cut_short_is_no_step(tmp_path: Path, reference: Path, cache: Path, bucket: Bucket, step: int):
    """Killed while a step's first files are there and its mark is not."""
    process = start(URL, EVERY, cache=cache, **bucket.environment)
    while not bucket.names(f"{UNDER}checkpoints/{step}/") and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    wait(process)
    result = finish(URL, EVERY, cache=cache, **bucket.environment)
    assert result.returncode == 0, result.stderr
    _assert_same_run(_copy(bucket, tmp_path / "copy"), reference)


@pytest.mark.nightly
def test_a_bucket_may_hold_half_a_step_and_no_other(tmp_path: Path, reference: Path, cache: Path, bucket: Bucket):
    """Cleared away, it takes the folder of the steps with it."""
    for number in range(20):
        bucket.put(f"{UNDER}checkpoints/2/params/{number}", b"half", {})
    result = finish(URL, EVERY, cache=cache, **bucket.environment)
    assert result.returncode == 0, result.stderr
    _assert_same_run(_copy(bucket, tmp_path / "copy"), reference)


@pytest.mark.nightly
def test_a_run_in_a_bucket_stops_when_asked(tmp_path: Path, reference: Path, cache: Path, bucket: Bucket):
    process = start(URL, EVERY, cache=cache, **bucket.environment)
    _wait_for(bucket, "checkpoints/2/commit_success.txt", process)
    process.send_signal(signal.SIGTERM)
    result = wait(process, timeout=60)
    assert result.returncode == 75, result.stderr
    record = json.loads(bucket.objects[UNDER + "run.json"][0])
    assert (record["status"], record["exit_code"]) == ("preempted", 75)
    assert f"{UNDER}checkpoints/{record['step']}/commit_success.txt" in bucket.objects
    assert finish(URL, EVERY, cache=cache, **bucket.environment).returncode == 0
    _assert_same_run(_copy(bucket, tmp_path / "copy"), reference)


@pytest.mark.nightly
def test_a_damaged_step_in_a_bucket_is_put_aside(tmp_path: Path, reference: Path, cache: Path, bucket: Bucket):
    assert finish(URL, EVERY, cache=cache, **bucket.environment).returncode == 0
    names = [f"/{name}" for name in bucket.names(f"{UNDER}checkpoints/{STEPS}/")]
    for name in bucket.names(f"{UNDER}checkpoints/{STEPS}/params/"):
        path = f"{UNDER}checkpoints/{STEPS}/params/{name}"
        content, generation = bucket.objects[path]
        if "/d/" in path:
            bucket.objects[path] = bytes(len(content)), generation
    result = finish(URL, EVERY, cache=cache, **bucket.environment)
    assert result.returncode == 0, result.stderr
    assert f"It was put aside; going on from step {STEPS - 2}" in result.stderr
    aside = bucket.names(f"{UNDER}damaged/{STEPS}-")
    assert [name[name.index("/") :] for name in aside] == names
    _assert_same_run(_copy(bucket, tmp_path / "copy"), reference)


@pytest.mark.nightly
def test_two_processes_share_a_bucket(tmp_path: Path, reference: Path, bucket: Bucket):
    """Compiled programs, too, are kept there."""
    running = start_several(URL, 2, EVERY, **bucket.environment)
    for process in running:
        result = wait(process)
        assert result.returncode == 0, result.stderr
    copy = _copy(bucket, tmp_path / "copy")
    assert [line[3] for line in story(copy)] == [line[3] for line in story(reference)]
    assert open_workdir(str(copy))[1].step == STEPS
    assert bucket.names(f"{UNDER}compiled/")


def test_a_bucket_that_is_not_there_is_one_line(bucket: Bucket, cache: Path):
    result = finish("gs://another/runs/one", EVERY, cache=cache, **bucket.environment)
    assert result.returncode == 74, result.stderr
    assert "gs://another/runs/one could not be" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("url", ["s3://bucket/run", "https://host/run"])
def test_other_addresses_are_refused(url: str, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.chdir(ROOT)
    assert main(command(url, EVERY)[3:]) == 2
    assert f"--workdir must be a folder or gs://BUCKET/NAME; got '{url}'" in capfd.readouterr().err
