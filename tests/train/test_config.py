"""Configs and their overrides: every field by its type, every mistake with its remedy."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from llava_jax.data.rows import Captions
from llava_jax.errors import UserError
from llava_jax.train.config import OptimConfig, TrainConfig, apply_override, flatten, load_config
from llava_jax.train.objectives import contrastive

DEBUG = str(Path(__file__).parents[2] / "configs" / "debug_cpu.py")


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return load_config(DEBUG)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=7", 7),
        ("stacked=true", True),
        ("stacked=False", False),
        ("compute_dtype=bfloat16", "bfloat16"),
        ("optim.learning_rate=2e-5", 2e-5),
        ("optim.learning_rate=1", 1.0),
        ("optim.clip_norm=none", None),
        ("optim.clip_norm=0.5", 0.5),
        ("data.steps=3", 3),
        ("data.steps=None", None),
        ("data.records=a=b.json", "a=b.json"),
        ("data.records=", ""),
        ("data.records=7", "7"),
        ("data.shuffle=false", False),
        ("data.rows.length=64", 64),
        ("data.rows.overflow=text", "text"),
        ("data.rows.template.system=Be brief.", "Be brief."),
        ("mesh.fsdp=-1", -1),
        ("model.text.num_layers=1", 1),
        ("model.text.sliding_window=16", 16),
        ("init.tower=somewhere", "somewhere"),
        ("optim.part_learning_rates.projector=1", 1.0),
        ("optim.part_learning_rates.decoder=2e-5", 2e-5),
    ],
)
def test_an_override_sets_one_field(config: TrainConfig, override: str, value):
    path = override.partition("=")[0]
    after = flatten(apply_override(config, override))
    before = flatten(config)
    assert after[path] == value
    assert type(after[path]) is type(value)
    assert {name for name in after | before if after.get(name) != before.get(name)} <= {path}


def test_a_rate_for_a_part_is_a_number_though_none_was_set_before(config: TrainConfig):
    plain = dataclasses.replace(config, optim=OptimConfig(learning_rate=1e-3))
    changed = apply_override(plain, "optim.part_learning_rates.projector=1e-4")
    assert changed.optim.part_learning_rates == {"projector": 1e-4}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.learning_rte=1", "Unknown field 'learning_rte' .*Did you mean 'learning_rate'"),
        ("optm.learning_rate=1", "Did you mean 'optim'"),
        ("data.row.length=1", "Did you mean 'rows'"),
        ("zzzzzz=1", "Known: model, objective"),
        ("=1", "Unknown field ''"),
        ("data.=1", "Unknown field ''"),
        (".=1", "Unknown field ''"),
        ("seed", "takes a.b=value; got 'seed'"),
        ("", "takes a.b=value; got ''"),
        ("seed=x", "expected int; got 'x'"),
        ("seed=1.5", "expected int; got '1.5'"),
        ("seed=none", "expected int; got 'none'"),
        ("stacked=1", "expected bool; got '1'"),
        ("optim.learning_rate=fast", "expected float; got 'fast'"),
        ("data.steps=many", "expected int | None; got 'many'"),
        ("compute_dtype=float16", "got 'float16'"),
        ("remat=some", "got 'some'"),
        ("data.rows.overflow=cut", "got 'cut'"),
        ("trainable=projector", "cannot be set here; edit the config file"),
        ("model=tiny", "cannot be set here; edit the config file"),
        ("objective=contrastive", "cannot be set here"),
        ("init=random", "cannot be set here"),
        ("seed.x=1", "no fields"),
        ("init.tower.x=1", "is a value, not a group"),
        ("data.rows.length=1", "length >= 2"),
        ("accumulation=0", "accumulation must be at least 1; got 0"),
        ("log_every=-1", "log_every must be at least 1"),
        ("checkpoint_every=0", "checkpoint_every must be at least 1"),
        ("model.text.num_heads=3", "num_kv_heads must divide text.num_heads"),
        ("model.projector=mlp", "mlpNx_gelu"),
        ("model.select_layer=9", "select_layer must index"),
    ],
)
def test_a_wrong_override_is_named_with_its_remedy(config: TrainConfig, override: str, says: str):
    with pytest.raises(UserError, match=says.replace("|", r"\|")) as error:
        apply_override(config, override)
    assert override in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "optim.learning_rate=nan",
        "optim.learning_rate=inf",
        "optim.learning_rate=-1",
        "optim.weight_decay=-1",
        "optim.warmup_ratio=2",
        "optim.warmup_ratio=-0.5",
        "optim.clip_norm=0",
        "optim.clip_norm=-1",
        "optim.b1=1",
        "optim.b2=-0.1",
        "optim.eps=-1",
        "optim.eps=0",
        "optim.part_learning_rates.projector=nan",
        "data.workers=-1",
        "data.max_refused=-1",
        "data.max_refused=nan",
        "seed=-1",
        "seed=4294967296",
    ],
)
def test_a_value_that_no_run_can_mean_is_refused(config: TrainConfig, override: str):
    with pytest.raises(UserError, match=override.split(".")[-1].partition("=")[0]):
        apply_override(config, override)


def test_a_contrastive_batch_cannot_be_split(config: TrainConfig):
    with pytest.raises(ValueError, match="accumulation=2. Set it to 1"):
        dataclasses.replace(config, objective=contrastive, accumulation=2)
    # Nor pairs under an objective of one's own.
    pairs = dataclasses.replace(config.data, rows=Captions(length=8))
    with pytest.raises(ValueError, match="accumulation=2. Set it to 1"):
        dataclasses.replace(config, data=pairs, accumulation=2)


def test_a_run_trains_something(config: TrainConfig):
    with pytest.raises(ValueError, match="at least one part"):
        dataclasses.replace(config, trainable=())


def test_configs_do_not_change(config: TrainConfig):
    before = flatten(config)
    for override in ("seed=1", "init.tower=x", "optim.part_learning_rates.projector=1"):
        apply_override(config, override)
    assert flatten(config) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_a_flat_config_names_every_leaf(config: TrainConfig):
    flat = flatten(config)
    assert flat["model.text.embed_dim"] == 32
    assert flat["init.tower"] == "random"
    assert flat["objective"] == "next_token"
    assert flat["data.rows.type"] == "Conversations"
    assert flat["data.rows.template.style"] == "dialogue"
    assert not any(dataclasses.is_dataclass(value) for value in flat.values())


@pytest.mark.parametrize(("text", "says"), [("x = 1\n", "must define get_config"), (None, "which does not exist")])
def test_a_config_file_must_be_one(tmp_path: Path, text: str | None, says: str):
    path = tmp_path / "config.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        load_config(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("import no_such_module\n", "line 1, cannot be loaded: .*no_such_module"),
        ("def get_config():\n    return 3\n", "returned 3"),
        ('{"model": true}\n', "line 1, cannot be loaded: NameError: name 'true'"),
        ("def get_config():\n    return Train()\n", "line 2, cannot be loaded: NameError: name 'Train'"),
        ("get_config = None\n", "TypeError"),
        (
            "from llava_jax.train.config import OptimConfig\n\ndef get_config():\n    return OptimConfig(rate=1)\n",
            "rate",
        ),
        ("\0PNG", "null bytes"),
        ("def get_config():\n    raise KeyError('x')\n", "line 2, cannot be loaded: KeyError: 'x'"),
    ],
)
def test_a_broken_config_file_is_a_users_error(tmp_path: Path, text: str, says: str):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        load_config(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_may_start_from_its_neighbour(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\nfrom neighbour_of_mine import get_config as base\n\n\n"
        "def get_config():\n    return dataclasses.replace(base(), seed=7)\n"
    )
    (tmp_path / "neighbour_of_mine.py").write_text(Path(DEBUG).read_text())
    before = list(sys.path)
    assert load_config(str(path)) == dataclasses.replace(load_config(DEBUG), seed=7)
    assert sys.path == before


def test_quantized_weights_do_not_learn(config: TrainConfig):
    with pytest.raises(UserError, match="Quantized weights do not learn; got quantize='nf4'"):
        apply_override(config, "quantize=nf4")
    frozen = dataclasses.replace(config, trainable=("projector",))
    assert apply_override(frozen, "quantize=int8").quantize == "int8"
    with pytest.raises(UserError, match="expected .*nf4.*; got .int3."):
        apply_override(frozen, "quantize=int3")


def test_overrides_apply_in_order():
    config = load_config(DEBUG, ("data.steps=none", "data.epochs=2", "seed=1", "seed=2"))
    assert (config.data.steps, config.data.epochs, config.seed) == (None, 2, 2)


@pytest.mark.parametrize("name", sorted(name for name in os.listdir(Path(DEBUG).parent) if name.endswith(".py")))
def test_every_config_says_how_to_launch_it(name: str):
    text = (Path(DEBUG).parent / name).read_text()
    assert f"--config configs/{name}" in text or "get_config" not in text
