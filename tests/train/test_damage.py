"""A flipped bit in a checkpoint is found before a value is used, the array is named, and an older step is taken."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_jax.convert.workdir import open_workdir
from llava_jax.errors import CheckpointError
from llava_jax.train.checkpoint import Checkpoints
from llava_jax.train.config import load_config
from llava_jax.train.optim import make_optimizer
from llava_jax.train.sharding import make_mesh
from llava_jax.train.state import Layout, resumed_state
from tests.train.runs import (
    EVERY,
    ROOT,
    STEPS,
    arrays,
    assert_same_bits,
    finish,
    saved_steps,
    start_several,
    story,
    wait,
)

NEWEST, OLDER = STEPS, STEPS - 2


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoilt; it holds two steps."""
    return Path(shutil.copytree(reference, tmp_path / "run"))


@pytest.fixture(scope="module")
def layout() -> Layout:
    config = load_config(str(ROOT / "configs" / "debug_cpu.py"), (f"data.steps={STEPS}",))
    return Layout(config, make_optimizer(config.optim, STEPS), make_mesh(config.mesh))


def _array_files(folder: Path) -> list[Path]:
    """Files that hold values of arrays: OCDBT's data files, those of every process's folder included."""
    return sorted(path for path in folder.rglob("d/*") if path.is_file() and path.stat().st_size)


def _flip(files: list[Path], rng: random.Random) -> Path:
    """Flips one bit, each bit of all files being equally likely."""
    path = rng.choices(files, [file.stat().st_size for file in files])[0]
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path


def _restore(run: Path, layout: Layout):
    checkpoints = Checkpoints(str(run))
    try:
        return resumed_state(layout, checkpoints, lambda position: None)
    finally:
        checkpoints.close()


def _assert_flips_are_found(run: Path, layout: Layout, good: dict, count: int, seed: int, capfd) -> None:
    """So many flips are found, each with an array's name and the step before taken; others change nothing."""
    rng = random.Random(seed)
    step = run / "checkpoints" / str(NEWEST)
    files = _array_files(step)
    contents = {path: path.read_bytes() for path in files}
    found = tries = 0
    while found < count:
        tries += 1
        damaged = _flip(files, rng)
        capfd.readouterr()
        state = _restore(run, layout)
        said = capfd.readouterr().err
        if state.step == OLDER:
            found += 1
            assert f"step {NEWEST}" in said
            assert any(name in said for name in (*state.trainable, "count")), said
            assert "was put aside; going on from step" in said
            shutil.move(next((run / "damaged").glob(f"{NEWEST}-*")), step)
        else:
            # A bit that nothing reads: the values are those that were saved.
            assert said == ""
            for name, value in state.trainable.items():
                assert np.asarray(value).tobytes() == good[f"params['{name}']"].tobytes()
        damaged.write_bytes(contents[damaged])
    assert tries < 2 * count, "most bits of a checkpoint are values"


def test_flipped_bits_are_found_and_the_step_before_is_taken(run: Path, layout: Layout, reference: Path, capfd):
    _assert_flips_are_found(run, layout, arrays(reference, NEWEST), 20, 0, capfd)


@pytest.mark.nightly
def test_more_flipped_bits_are_found(run: Path, layout: Layout, reference: Path, capfd):
    _assert_flips_are_found(run, layout, arrays(reference, NEWEST), 200, 1, capfd)


def _change_array(step: Path, item: str) -> str:
    """Writes another step's file of one item in place of its own, as a faulty disk may; the values stay readable."""
    other = step.parent / str(OLDER) / item
    shutil.rmtree(step / item)
    shutil.copytree(other, step / item)
    return item


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_the_damaged_array_is_named(run: Path, layout: Layout, item: str, capfd):
    _change_array(run / "checkpoints" / str(NEWEST), item)
    assert _restore(run, layout).step == OLDER
    said = capfd.readouterr().err
    assert f"the {item} of step {NEWEST}" in said
    assert "projector.linear_1" in said or "decoder." in said
    assert saved_steps(run) == [OLDER]


def test_a_damaged_position_is_found(run: Path, layout: Layout, capfd):
    path = run / "checkpoints" / str(NEWEST) / "position" / "metadata"
    path.write_text(path.read_text().replace("a", "b", 1))
    assert _restore(run, layout).step == OLDER
    assert "its position differs" in capfd.readouterr().err


def test_a_damaged_record_is_found(run: Path, layout: Layout, capfd):
    path = run / "checkpoints" / str(NEWEST) / "integrity" / "metadata"
    record = json.loads(path.read_text())
    name = next(iter(record["params"]))
    record["params"][name] = record["params"][name][::-1]
    path.write_text(json.dumps(record))
    assert _restore(run, layout).step == OLDER
    assert "integrity record differs" in capfd.readouterr().err


def test_no_good_step_is_no_start_from_nothing(run: Path, layout: Layout):
    for step in (NEWEST, OLDER):
        for path in _array_files(run / "checkpoints" / str(step) / "params"):
            path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(CheckpointError, match="No saved step is good.*choose another --workdir"):
        _restore(run, layout)
    assert saved_steps(run) == [OLDER, NEWEST]


def _flip_value(folder: Path, restore) -> None:
    """Flips bits until one of a value is hit, which makes the restore fail."""
    rng = random.Random(0)
    files = _array_files(folder)
    for _ in range(20):
        path = rng.choice(files)
        content = path.read_bytes()
        _flip([path], rng)
        try:
            restore()
        except CheckpointError:
            return
        path.write_bytes(content)
    raise AssertionError("no flip was found")


def test_frozen_parameters_have_no_older_copy(run: Path, layout: Layout):
    _flip_value(run / "frozen", lambda: _restore(run, layout))
    with pytest.raises(CheckpointError, match="frozen"):
        _restore(run, layout)
    with pytest.raises(CheckpointError, match="frozen"):
        open_workdir(str(run))[0]


def test_reading_a_workdir_takes_the_newest_good_step(run: Path, reference: Path, capfd):
    newest, older = arrays(reference, NEWEST), arrays(reference, OLDER)
    values = open_workdir(str(run))[0]
    assert all(np.asarray(values[n]).tobytes() == newest[f"params['{n}']"].tobytes() for n in _trained(newest))
    values = open_workdir(str(run), step=OLDER)[0]
    assert all(np.asarray(values[n]).tobytes() == older[f"params['{n}']"].tobytes() for n in _trained(older))
    with pytest.raises(CheckpointError, match=f"holds the steps {OLDER}, {NEWEST}; got 3"):
        open_workdir(str(run), step=3)[0]
    _change_array(run / "checkpoints" / str(NEWEST), "params")
    for says in (f"step {NEWEST}", "could not be read"):
        capfd.readouterr()
        values = open_workdir(str(run))[0]
        assert says in capfd.readouterr().err
        assert all(np.asarray(values[n]).tobytes() == older[f"params['{n}']"].tobytes() for n in _trained(older))
        # The second time, it cannot even be read.
        for path in _array_files(run / "checkpoints" / str(NEWEST) / "params"):
            path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match="could not be read"):
        open_workdir(str(run), step=NEWEST)[0]
    assert saved_steps(run) == [OLDER, NEWEST], "reading moves nothing"


def _trained(saved: dict) -> list[str]:
    return [name.removeprefix("params['").removesuffix("']") for name in saved if name.startswith("params")]


def test_a_run_goes_on_from_the_step_before(run: Path, reference: Path, cache: Path):
    _change_array(run / "checkpoints" / str(NEWEST), "optimizer")
    result = finish(run, EVERY, cache=cache)
    assert result.returncode == 0, result.stderr
    assert f"resuming at step {OLDER}" in result.stdout
    assert f"the optimizer of step {NEWEST}" in result.stderr
    assert story(run) == story(reference)
    assert_same_bits(arrays(run, STEPS), arrays(reference, STEPS))


@pytest.mark.nightly
@pytest.mark.parametrize("damage", ["exchanged", "zeroed"])
def test_two_processes_take_the_same_older_step(tmp_path: Path, reference: Path, cache: Path, damage: str):
    """One of them alone may see that its share cannot be read; both must go back."""
    workdir = tmp_path / "run"
    assert [wait(process).returncode for process in start_several(workdir, 2, EVERY, cache=cache)] == [0, 0]
    step = workdir / "checkpoints" / str(NEWEST)
    if damage == "exchanged":
        _change_array(step, "optimizer")
    else:
        for path in (step / "optimizer" / "ocdbt.process_1").rglob("d/*"):
            path.write_bytes(bytes(path.stat().st_size))
    for process in start_several(workdir, 2, EVERY, cache=cache):
        result = wait(process)
        assert result.returncode == 0, result.stderr
        assert f"going on from step {OLDER}" in result.stderr
    assert [line[3] for line in story(workdir)] == [line[3] for line in story(reference)]
