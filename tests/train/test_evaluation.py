"""The held-out loss is that of its records, however they are packed; asking for it changes no step."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest

from llava_jax.errors import UserError
from llava_jax.train.checkpoint import Checkpoints
from llava_jax.train.config import apply_override, load_config
from llava_jax.train.evaluation import HeldOut, check_evaluation
from llava_jax.train.forecast import save_forecast
from llava_jax.train.loop import data_needs
from llava_jax.train.metrics import MetricsLog, read_metrics
from llava_jax.train.mirror import Mirror
from llava_jax.train.optim import make_optimizer
from llava_jax.train.record import RunRecord
from llava_jax.train.sharding import make_mesh
from llava_jax.train.state import Layout, fresh_state
from llava_jax.train.stop import Stop
from tests.train.runs import ROOT, STEPS, finish, hold_out, loss_one_by_one, story


@pytest.fixture(scope="module")
def config():
    return load_config(str(ROOT / "configs" / "debug_cpu.py"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, cache: Path, config) -> Path:
    """A run that evaluates on a part of its records and traces two steps."""
    folder = tmp_path_factory.mktemp("watched")
    hold_out(config, folder / "held_out.json")
    settings = (f"life.eval_records={folder / 'held_out.json'}", "life.eval_every=4", "life.profile=2:4")
    result = finish(folder / "run", "checkpoint_every=2", *settings, cache=cache)
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_watching_changes_no_step(watched: Path, reference: Path):
    assert story(watched) == story(reference)


def test_the_loss_is_measured_where_it_was_asked_for(watched: Path):
    lines = read_metrics(str(watched))
    assert [line["step"] + 1 for line in lines if "eval_loss" in line] == [4, 8, STEPS]
    measured = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert measured[-1] < measured[0]


def test_the_loss_is_that_of_its_records_one_by_one(watched: Path, config):
    loss = loss_one_by_one(watched, config, watched.parent / "held_out.json")
    assert read_metrics(str(watched))[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_trace_is_left(watched: Path):
    assert list((watched / "profiles").rglob("*.xplane.pb"))


def test_every_second_is_in_a_bucket(watched: Path):
    lines = read_metrics(str(watched))
    for line in lines:
        assert {"seconds_start", "seconds_data", "seconds_step", "seconds_save", "seconds_eval"} <= line.keys()
    assert sum(line["seconds_eval"] for line in lines) > 0
    assert lines[0]["seconds_start"] > 0
    assert all(line["seconds_start"] == 0 for line in lines[1:])


def test_an_evaluation_shows_life_and_ends_when_the_run_is_asked_to_stop(tmp_path: Path, config):
    hold_out(config, tmp_path / "held_out.json")
    config = apply_override(config, f"life.eval_records={tmp_path / 'held_out.json'}")
    config = apply_override(config, "data.batch_rows=4")
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optim, 1)
    held_out = HeldOut(config, data_needs(config), str(tmp_path), mesh, rows_per_step=4)
    with contextlib.closing(Checkpoints(str(tmp_path))) as saved:
        state = fresh_state(Layout(config, optimizer, mesh), optimizer, saved)
    stop = Stop(RunRecord(Mirror(str(tmp_path), str(tmp_path))))
    beats: list[bool] = []
    loss = held_out.loss(state.trainable, state.frozen, stop, beat=lambda: beats.append(True))
    assert loss is not None
    assert len(beats) > 2

    def ask() -> None:
        beats.append(True)
        stop.is_asked = True

    beats.clear()
    assert held_out.loss(state.trainable, state.frozen, stop, beat=ask) is None
    assert len(beats) == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [("life.eval_every=5", "go together"), ("life.eval_records=x.json", "go together")],
)
def test_half_an_evaluation_is_refused(config, override: str, says: str):
    with pytest.raises(UserError, match=says):
        check_evaluation(apply_override(config, override))


def test_an_evaluation_between_checkpoints_is_refused(config):
    config = apply_override(apply_override(config, "life.eval_records=x.json"), "life.eval_every=7")
    with pytest.raises(UserError, match="multiple of checkpoint_every=5; got 7"):
        check_evaluation(config)


def test_the_forecast_names_bytes_and_warns_of_a_short_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trees = {"x": np.zeros((1000, 1000), np.float32)}
    text = save_forecast(str(tmp_path), trees)
    assert "a save writes 4.0 MB" in text
    assert "SHORTER" not in text
    monkeypatch.setattr("llava_jax.train.forecast.GRACE_SECONDS", 0.0)
    assert "SHORTER" in save_forecast(str(tmp_path), trees)


def test_weights_and_biases_is_asked_for_by_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    MetricsLog(str(tmp_path), first_step=0).close()
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        MetricsLog(str(tmp_path), first_step=0, wandb_project="llava")


@pytest.mark.nightly
def test_weights_and_biases_takes_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real package, offline."""
    pytest.importorskip("wandb", reason="an extra of its own")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = MetricsLog(str(tmp_path), first_step=0, wandb_project="llava")
    log.write(0, {"loss": 2.5, "records": "00"})
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert read_metrics(str(tmp_path)) == [{"step": 0, "loss": 2.5, "records": "00"}]
    identity = (tmp_path / "wandb_id").read_text()
    MetricsLog(str(tmp_path), first_step=1, wandb_project="llava").close()
    assert (tmp_path / "wandb_id").read_text() == identity
