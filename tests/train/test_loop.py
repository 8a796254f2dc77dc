"""Whole runs through the command line: exit codes, one message, one compilation, the same losses in every layout."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from llava_jax.chips import KINDS, TPUS
from llava_jax.cli import main
from llava_jax.convert.folder import read_parameters
from llava_jax.data.anyres import AnyRes
from llava_jax.data.generated import temporary_data
from llava_jax.data.records import Turn
from llava_jax.inference.generate import Sampling, generate
from llava_jax.inference.model import load
from llava_jax.models.build import random_parameters
from llava_jax.train.config import load_config
from llava_jax.train.loop import train
from llava_jax.train.metrics import METRICS_FILE, MetricsLog, read_metrics
from tests.train.runs import ROOT, arrays, command, environment, finish, hold_out, saved_steps, story

SHORT = ("data.steps=4", "checkpoint_every=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "run"
    result = finish(workdir, *SHORT, cache=cache)
    assert result.returncode == 0, result.stderr
    return workdir


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def attempt(capfd: pytest.CaptureFixture):
    """Runs the command in this process: what fails early need not pay for a start of its own."""

    def run(workdir: Path, *overrides: str) -> subprocess.CompletedProcess:
        words = command(workdir, *overrides, config=str(ROOT / "configs" / "debug_cpu.py"))[3:]
        capfd.readouterr()
        code = main(words)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def _assert_recorded(workdir: Path, code: int) -> None:
    record = json.loads((workdir / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("failed", code)


def _assert_one_line(result: subprocess.CompletedProcess, code: int, *says: str) -> None:
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("llava-jax: ")]
    assert result.stderr.splitlines()[-1:] == lines, result.stderr
    assert "Traceback" not in result.stderr
    for words in says:
        assert words in lines[0]


def test_a_run_leaves_what_its_folder_promises(finished: Path):
    for name in ("model.json", "config.json", "tokenizer/tokenizer.json", "frozen", "tensorboard", METRICS_FILE):
        assert (finished / name).exists(), name
    assert saved_steps(finished) == [2, 4]
    record = json.loads((finished / "run.json").read_text())
    assert (record["status"], record["step"], record["num_steps"], record["exit_code"]) == ("done", 4, 4, 0)
    lines = read_metrics(str(finished))
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["learning_rate"] == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.learning_rte=1", "Did you mean 'learning_rate'"),
        ("data.batch_rows=none", "exactly one of data.batch_rows"),
        ("data.steps=none", "exactly one of data.epochs and data.steps"),
        ("init.towr=random", "towr"),
        ("optim.part_learning_rates.projectr=1e-3", "projectr"),
        ("mesh.fsdp=3", "mesh.fsdp=3"),
        ("data.tokenizer=no_such_folder", "no_such_folder"),
        ("model.text.vocab_size=10", "vocabulary"),
    ],
)
def test_a_wrong_setting_exits_with_2(tmp_path: Path, override: str, says: str, attempt):
    _assert_one_line(attempt(tmp_path / "run", *SHORT, override), 2, says)
    if (tmp_path / "run").exists():
        # What is only found out when devices and data are looked at.
        _assert_recorded(tmp_path / "run", 2)


def test_a_missing_start_exits_with_74(tmp_path: Path, attempt):
    _assert_one_line(attempt(tmp_path / "run", *SHORT, "init.tower=no_such_folder"), 74, "no_such_folder")


def test_missing_records_exit_with_66(tmp_path: Path, attempt):
    result = attempt(tmp_path / "run", *SHORT, "data.records=none.json")
    _assert_one_line(result, 66, "none.json")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert record["exit_code"] == 66
    assert "none.json" in record["message"]


def test_too_many_refused_records_exit_with_66(tmp_path: Path, attempt):
    result = attempt(tmp_path / "run", *SHORT, "data.rows.length=100")
    _assert_one_line(result, 66, "too long", "data.max_refused")


def test_a_workdir_that_is_a_file_is_one_line(tmp_path: Path, attempt):
    (tmp_path / "run").write_text("")
    result = attempt(tmp_path / "run", *SHORT)
    assert result.returncode in (2, 74)
    assert "Traceback" not in result.stderr


def test_a_folder_of_another_kind_is_left_alone(tmp_path: Path, attempt):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    _assert_one_line(attempt(tmp_path, *SHORT), 74, "must be new or hold a run", "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'
    assert main(["train", "--config", str(ROOT / "configs" / "debug_cpu.py"), "--workdir", ""]) == 2


@pytest.mark.nightly
def test_lines_that_are_left_out_lose_nothing(tmp_path: Path, attempt):
    held = tmp_path / "held.json"
    hold_out(load_config(str(ROOT / "configs" / "debug_cpu.py")), held)
    evaluated = (f"life.eval_records={held}", "life.eval_every=2")
    result = attempt(tmp_path / "run", *SHORT, "data.steps=6", "log_every=4", *evaluated)
    assert result.returncode == 0, result.stderr
    lines = read_metrics(str(tmp_path / "run"))
    assert [line["step"] for line in lines] == [0, 1, 3, 4, 5]
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 3, 5]
    total = json.loads((tmp_path / "run" / "run.json").read_text())["seconds"]
    for name in ("start", "data", "eval"):
        assert sum(line[f"seconds_{name}"] for line in lines) == pytest.approx(total[name], abs=0.01), name


# What a rate makes of parameters may be finite, infinite at the first step, or no number at all.
@pytest.mark.parametrize("rate", [pytest.param("1e30", marks=pytest.mark.nightly), "1e300"])
def test_numbers_that_are_not_finite_exit_with_65_and_are_not_saved(tmp_path: Path, cache: Path, rate: str):
    settings = (*SHORT, "checkpoint_every=1", f"optim.learning_rate={rate}")
    result = finish(tmp_path / "run", *settings, f"optim.part_learning_rates.projector={rate}", cache=cache)
    _assert_one_line(result, 65, "must be finite")
    if saved_steps(tmp_path / "run"):
        assert all(np.isfinite(value).all() for value in arrays(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.learning_rate=1", "optim.learning_rate: 0.003 -> 1"),
        ("seed=1", "seed: 42 -> 1"),
        ("data.rows.length=300", "data.rows.length: 256 -> 300"),
        ("data.steps=5", "data.steps: 4 -> 5"),
    ],
)
def test_a_run_continues_only_with_its_config(run: Path, override: str, says: str, attempt):
    _assert_one_line(attempt(run, *SHORT, override), 74, says)


def test_a_run_continues_only_on_its_data(run: Path, tmp_path: Path, attempt):
    data = temporary_data(num_records=64, image_size=16, seed=0)
    records = json.loads((data / "records.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(records[::-1]))
    _assert_one_line(attempt(run, *SHORT, f"data.records={tmp_path / 'other.json'}"), 74, "have changed")


def test_what_may_change_changes_nothing(run: Path, tmp_path: Path, finished: Path, cache: Path):
    data = temporary_data(num_records=64, image_size=16, seed=0)
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    shutil.rmtree(run / "checkpoints" / "4")
    settings = (f"data.records={moved / 'records.json'}", f"data.image_root={moved / 'pictures'}", "log_every=1")
    result = finish(run, "data.steps=4", "checkpoint_every=1", *settings, cache=cache)
    assert result.returncode == 0, result.stderr
    assert "resuming at step 2" in result.stdout
    assert story(run) == story(finished)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_a_damaged_checkpoint_without_an_older_one_exits_with_74(run: Path, damage: str, attempt):
    """The largest file of parameters, of the optimizer's state and of what is frozen."""
    shutil.rmtree(run / "checkpoints" / "2")
    for part in ("checkpoints/4/params", "checkpoints/4/optimizer", "frozen"):
        path = max(_files(run / part), key=lambda path: path.stat().st_size)
        content = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2])
        _assert_one_line(attempt(run, *SHORT), 74)
        path.write_bytes(content)


@pytest.mark.nightly
@pytest.mark.parametrize("override", ["stacked=true", "accumulation=4", "remat=everything"])
def test_another_way_to_the_same_numbers_gives_the_same_losses(
    tmp_path: Path, finished: Path, cache: Path, override: str
):
    result = finish(tmp_path / "run", *SHORT, override, cache=cache)
    assert result.returncode == 0, result.stderr
    for before, after in zip(read_metrics(str(finished)), read_metrics(str(tmp_path / "run")), strict=True):
        assert before["records"] == after["records"]
        assert before["weight"] == after["weight"]
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-5), before["step"]


COUNT = """
import sys, jax
steps, calls = [], []
from llava_jax import cli
import llava_jax.train.loop as loop, llava_jax.train.step as step
make_step = step.make_step
def counted(*a, **k):
    made = make_step(*a, **k)
    def traced(*arguments):
        calls.append(1)
        return made(*arguments)
    return traced
step.make_step = counted
original = loop.Report.add
compiled = []
def listen(name, *a, **k):
    if "backend_compile" in name:
        compiled.append(name)
jax.monitoring.register_event_duration_secs_listener(listen)
def add(self, step, *a):
    steps.append(len(compiled))
    return original(self, step, *a)
loop.Report.add = add
code = cli.main(sys.argv[1:])
print("COUNTS", code, len(calls), steps)
"""


def test_a_run_compiles_its_step_once(tmp_path: Path):
    words = command(tmp_path / "run", "data.steps=6", "checkpoint_every=2")[3:]
    result = subprocess.run(
        [sys.executable, "-c", COUNT, *words], cwd=ROOT, env=environment(None), capture_output=True, text=True
    )
    _, code, calls, steps = result.stdout[result.stdout.index("COUNTS") :].split(" ", 3)
    steps = json.loads(steps)
    assert (code, calls) == ("0", "1"), result.stderr
    # From the second step on nothing is compiled, checkpoints at steps 2 and 4 included.
    assert len(set(steps[1:])) == 1, steps


def test_mfu_is_told_where_the_chip_is_known(finished: Path, tmp_path: Path, attempt, monkeypatch: pytest.MonkeyPatch):
    assert not any("mfu" in line for line in read_metrics(str(finished)))
    slow = dataclasses.replace(TPUS["v5e"], flops=1e11)
    monkeypatch.setitem(KINDS, jax.devices()[0].device_kind, slow)
    result = attempt(tmp_path / "run", *SHORT)
    assert re.search(r"step 4/4, loss \S+, \S+ tokens/s, [\d.]+% MFU, 0 s left", result.stdout), result.stdout
    at_peak = [line["mfu"] * line["seconds"] for line in read_metrics(str(tmp_path / "run"))]
    assert min(at_peak) > 0
    # One number for all steps; both factors are rounded.
    np.testing.assert_allclose(at_peak, at_peak[0], rtol=0.01)


@pytest.mark.parametrize("name", ["config.json", METRICS_FILE])
def test_a_damaged_file_of_the_run_is_named(run: Path, attempt, name: str):
    shutil.rmtree(run / "checkpoints" / "4")
    (run / name).write_text("{\n")
    _assert_one_line(attempt(run, *SHORT), 74, name)


def test_metrics_forget_what_lies_past_the_restored_step(tmp_path: Path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)]
    (tmp_path / METRICS_FILE).write_text("".join(lines) + '{"step": 5, "lo')
    log = MetricsLog(str(tmp_path), first_step=3)
    log.write(3, {"loss": 2.0})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(str(tmp_path))] == [
        (0, 1.0),
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
    ]


def test_generated_data_belongs_to_the_user_who_made_it():
    """On a shared machine the next user cannot read a folder that the first one made."""
    folder = temporary_data(num_records=2, image_size=16, seed=0)
    assert str(os.getuid()) in folder.name or folder.stat().st_mode & 0o055 == 0o055


def test_a_model_of_any_resolution_trains_with_its_tower_and_answers(tmp_path: Path):
    """Pictures of many sizes in one compilation; the newline learns; the workdir opens with its resolutions."""
    data = temporary_data(num_records=32, image_size=16, seed=7)
    shutil.copytree(data, tmp_path / "data")
    for number, path in enumerate(sorted((tmp_path / "data" / "pictures").iterdir())):
        Image.open(path).resize(((8, 40, 30, 16)[number % 4], (24, 20, 31, 16)[number % 4])).save(path)
    base = load_config(str(ROOT / "configs" / "debug_cpu.py"))
    mode = AnyRes(pinpoints=((16, 32), (32, 16), (32, 32)), merge="spatial_unpad", rounding="original")
    model = dataclasses.replace(base.model, image_newline=True)
    parts = ("tower", "projector", "decoder", "image_newline")
    config = dataclasses.replace(
        base,
        model=model,
        init=dict.fromkeys(parts, "random"),
        trainable=parts,
        optim=dataclasses.replace(base.optim, part_learning_rates={"tower": 1e-4}),
        data=dataclasses.replace(
            base.data,
            records=str(tmp_path / "data" / "records.json"),
            image_root=str(tmp_path / "data" / "pictures"),
            rows=dataclasses.replace(base.data.rows, tiles=10, image_mode=mode),
            batch_rows=2,
            steps=3,
        ),
        remat="everything",
    )
    train(config, str(tmp_path / "run"))
    assert [line["step"] for line in read_metrics(str(tmp_path / "run"))] == [0, 1, 2]
    trained = read_parameters(str(tmp_path / "run"))
    started = random_parameters(model, parts, seed=config.seed)
    for name in ("image_newline", "tower.patch_embedding.kernel"):
        assert not np.array_equal(trained[name], started[name]), name
    opened, processor = load(str(tmp_path / "run"))
    assert processor.image_mode == mode
    picture = Image.open(tmp_path / "data" / "pictures" / "0_0.png")
    prompts = [
        processor.ask([Turn("user", "Which?")], images) for images in ([picture], [picture.resize((30, 31))], [])
    ]
    answers = generate(opened, processor, prompts, Sampling(max_new_tokens=2))
    assert [answer.prompt_tokens for answer in answers] == [len(prompt.tokens) for prompt in prompts]


def test_a_mode_that_needs_a_newline_stops_before_anything_is_read(tmp_path: Path):
    base = load_config(str(ROOT / "configs" / "debug_cpu.py"))
    mode = AnyRes(pinpoints=((16, 32),), merge="spatial_unpad", rounding="original")
    rows = dataclasses.replace(base.data.rows, image_mode=mode)
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, rows=rows))
    with pytest.raises(ValueError, match="image_newline=False"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "cache").exists()
