"""Training with adapters: what learns and is kept, exact resume, and the workdir as a model of its own."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert.folder import read_parameters
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.lora import LoraConfig, dropout_keys, initial_factor, is_adapter
from llava_jax.models.parameters import part, stack_layers
from llava_jax.models.quantized import dequantize, quantize
from llava_jax.train.config import OptimConfig, load_config
from llava_jax.train.metrics import read_metrics
from llava_jax.train.optim import make_optimizer
from llava_jax.train.sharding import MeshConfig, make_mesh, partition
from llava_jax.train.state import Layout
from tests.tiny import LLAVA
from tests.train.runs import (
    ROOT,
    arrays,
    assert_same_bits,
    command,
    environment,
    hold_out,
    loss_one_by_one,
    saved_steps,
    story,
)

CONFIG = "configs/debug_lora.py"


def layout(**changes) -> Layout:
    config = dataclasses.replace(load_config(str(ROOT / CONFIG)), **changes)
    return Layout(config, make_optimizer(OptimConfig(learning_rate=1e-3), 10), make_mesh(MeshConfig()))


@pytest.mark.parametrize("stacked", [False, True])
def test_adapters_and_projector_learn_and_nothing_else_has_moments(stacked: bool):
    trainable, frozen, opt_state = layout(stacked=stacked).memory
    assert {part(name) for name in trainable} == {"projector", "decoder"}
    assert all(is_adapter(name) for name in trainable if part(name) == "decoder")
    assert {part(name) for name in frozen} == {"tower", "decoder"}
    assert not any(map(is_adapter, frozen))
    moments = next(item for item in opt_state if hasattr(item, "mu"))
    assert moments.mu.keys() == moments.nu.keys() == trainable.keys()


def test_the_model_is_bound_to_parameters_and_keys_of_dropout():
    made = layout()
    trainable, frozen, _ = made.memory
    assert set(made.bound) == {*trainable, *frozen, *dropout_keys(made.bound, jax.random.key(0))}


@pytest.mark.parametrize("stacked", [False, True])
def test_a_factor_lies_as_the_side_of_the_kernel_that_it_belongs_to(stacked: bool):
    values = structure(LLAVA, stacked=stacked, lora=LoraConfig(rank=4, alpha=8.0))[1]
    for name in values:
        spec = partition(name)
        if is_adapter(name):
            kernel = partition(f"{name.rpartition('.')[0]}.kernel")
            rank_last = name.endswith("lora_a")
            assert spec[-1 if rank_last else -2] is None
            assert spec[-2 if rank_last else -1] == kernel[-2 if rank_last else -1]


def test_lora_without_a_trained_decoder_is_refused():
    config = load_config(str(ROOT / CONFIG))
    with pytest.raises(ValueError, match="lora adapts a decoder that is trained; got trainable=\\('projector',\\)"):
        dataclasses.replace(config, trainable=("projector",))


def train(workdir: Path, cache: Path, *overrides: str) -> subprocess.CompletedProcess:
    settings = command(workdir, "data.workers=0", "checkpoint_every=4", *overrides, config=CONFIG)
    return subprocess.run(settings, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    hold_out(load_config(str(ROOT / CONFIG)), folder / "held_out.json")
    done = train(folder / "run", cache, f"life.eval_records={folder / 'held_out.json'}", "life.eval_every=12")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_held_out_loss_is_that_of_the_merged_model_without_dropout(trained: Path):
    loss = loss_one_by_one(trained, load_config(str(ROOT / CONFIG)), trained.parent / "held_out.json")
    assert read_metrics(str(trained))[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_run_with_adapters_learns_and_saves_them_alone(trained: Path):
    losses = [loss for _, loss, _, _ in story(trained)]
    assert losses[-1] < losses[0]
    saved = {name for name in arrays(trained) if name.startswith("params")}
    assert any("lora_a" in name for name in saved)
    assert not any(name.endswith("kernel']") for name in saved if "decoder" in name)


@pytest.mark.nightly
def test_a_run_with_adapters_goes_on_bit_for_bit(trained: Path, tmp_path: Path, cache: Path):
    """Dropout, too, is where it was: the later steps are taken away, then the same command continues."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for step in saved_steps(workdir)[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    assert 0 < saved_steps(workdir)[-1] < saved_steps(trained)[-1]
    done = train(workdir, cache)
    assert done.returncode == 0, done.stderr
    assert_same_bits(arrays(trained), arrays(workdir))
    assert story(workdir) == story(trained)


def test_its_workdir_is_a_plain_model_with_the_adapters_merged(trained: Path):
    config = load_config(str(ROOT / CONFIG))
    merged = read_parameters(str(trained))
    assert {name: value.shape for name, value in merged.items()} == {
        name: value.shape for name, value in structure(config.model)[1].items()
    }
    assert config.lora is not None
    start = random_parameters(config.model, ("decoder",), seed=config.seed)
    saved = {name.removeprefix("params['").removesuffix("']"): value for name, value in arrays(trained).items()}
    changed = 0
    for name, value in start.items():
        stem = name.removesuffix(".kernel")
        if f"{stem}.lora_a" in saved:
            changed += 1
            value = value + config.lora.scale * saved[f"{stem}.lora_a"] @ saved[f"{stem}.lora_b"]
        np.testing.assert_allclose(np.asarray(merged[name]), value, atol=1e-6, err_msg=name)
    assert changed == 7 * config.model.text.num_layers


@pytest.mark.nightly
@pytest.mark.parametrize("stacked", ["false", "true"])
def test_a_run_on_quantized_weights_opens_as_those_with_its_adapters(tmp_path: Path, cache: Path, stacked: str):
    overrides = ("quantize=nf4", f"stacked={stacked}")
    done = train(tmp_path / "run", cache, *overrides)
    assert done.returncode == 0, done.stderr
    losses = [loss for _, loss, _, _ in story(tmp_path / "run")]
    assert losses[-1] < losses[0]
    config = load_config(str(ROOT / CONFIG), overrides)
    assert config.lora is not None
    found = read_parameters(str(tmp_path / "run"))
    assert found.keys() == structure(config.model)[1].keys()
    saved = {n.partition("['")[2].removesuffix("']"): value for n, value in arrays(tmp_path / "run").items()}
    start = random_parameters(config.model, ("decoder",), seed=config.seed)
    stem = "decoder.layers.1.mlp.down_proj"
    codes, absmax = quantize(jnp.asarray(start[f"{stem}.kernel"]), "nf4")
    change = config.lora.scale * saved[f"{stem}.lora_a"] @ saved[f"{stem}.lora_b"]
    assert np.abs(change).max() > 0
    expected = np.asarray(dequantize(codes, absmax, jnp.float32)) + change
    np.testing.assert_allclose(np.asarray(found[f"{stem}.kernel"]), expected, atol=1e-6)


def test_factors_of_a_stack_are_those_of_its_layers():
    names = [name for name in structure(LLAVA, lora=LoraConfig(rank=4, alpha=8.0))[1] if is_adapter(name)]
    rng = np.random.default_rng(0)
    apart = {n: initial_factor(n, (8, 4) if n.endswith("a") else (4, 8), rng) for n in names}
    stacked = stack_layers({name: jnp.asarray(value) for name, value in apart.items()})
    name = "decoder.layers.mlp.up_proj.lora_a"
    np.testing.assert_array_equal(stacked[name][1], apart["decoder.layers.1.mlp.up_proj.lora_a"])
