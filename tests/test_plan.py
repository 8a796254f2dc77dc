"""What `llava-jax plan` says of a config, and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from llava_jax import targets
from llava_jax.chips import GPUS, TPUS
from llava_jax.errors import UserError
from llava_jax.plan import _devices, as_text, plan, too_large
from llava_jax.train.config import TrainConfig, apply_override, load_config
from llava_jax.train.sharding import MeshConfig, make_mesh
from tests.train.runs import ROOT

HAS_COMPILER = find_spec("libtpu") is not None


def _config(name: str, *overrides: str) -> TrainConfig:
    """A config of the repository with fields replaced."""
    config = load_config(str(ROOT / "configs" / f"{name}.py"))
    for override in overrides:
        config = apply_override(config, override)
    return config


@pytest.fixture
def gpu_compiler() -> None:
    reason = targets.no_gpu_compiler("h200")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_gpu_compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans for GPUs are arithmetic here, wherever the tests run."""
    if "gpu_compiler" not in request.fixturenames:
        monkeypatch.setattr(targets, "no_gpu_compiler", lambda kind: "not in this test")


SHALLOW = ("model.text.num_layers=2", "model.vision.num_layers=2")


@pytest.fixture(scope="module")
def shallow() -> TrainConfig:
    """Two layers of each kind: describing thirty-two takes seconds, and follows no other rule."""
    return _config("llava15_finetune_7b", *SHALLOW)


@pytest.mark.parametrize("topology", ["v5e", "v5e:", "v5e:8", "v9:2x2", "h100", "h100:0", "h100:2x2", "tpu"])
def test_an_unknown_topology_is_refused_with_the_known_ones(shallow: TrainConfig, topology: str):
    with pytest.raises(UserError, match="must be like one of v4:4x4.*h100:8"):
        plan(shallow, topology)


def test_a_mesh_that_does_not_divide_is_refused(shallow: TrainConfig):
    with pytest.raises(UserError, match="must use all 8 devices"):
        plan(apply_override(shallow, "mesh.tensor=3"), "h100:8")
    with pytest.raises(UserError, match="divisible by its mesh axis"):
        plan(shallow, "h100:7")


def test_a_batch_that_does_not_divide_is_refused(shallow: TrainConfig):
    data = dataclasses.replace(shallow.data, batch_records=None, batch_rows=12)
    with pytest.raises(UserError, match="batch_rows must be a multiple of .*8 x 1; got 12"):
        plan(dataclasses.replace(shallow, data=data), "h100:8")


def test_rows_are_one_per_record_and_it_says_so(shallow: TrainConfig):
    result = plan(apply_override(shallow, "data.batch_records=100"), "h100:8")
    assert result.batch == {"rows": 104, "tokens": 104 * 2048, "accumulation": 1, "rows_per_chip_at_a_time": 13}
    assert any("one row per record" in text and "4 of them padding" in text for text in result.assumptions)


def test_a_gpu_plan_is_labelled_analytic_and_its_parts_add_up(shallow: TrainConfig):
    result = plan(shallow, "h100:8")
    parts = result.bytes_per_chip
    assert result.method == "analytic"
    assert result.assumptions[0].startswith("analytic")
    assert result.assumptions[1] == "no compiler: not in this test"
    assert parts["total"] == sum(v for name, v in parts.items() if name not in ("total", "headroom"))
    assert parts["total"] + parts["headroom"] == pytest.approx(0.95 * result.hbm_bytes, abs=1)
    bound = result.step_seconds_lower_bound
    assert bound["seconds"] == max(bound[name] for name in ("compute", "memory", "links"))
    assert 0 < result.mfu_ceiling <= result.flops / result.executed_flops < 1
    assert result.mfu_ceiling == pytest.approx(result.flops / (8 * 989.4e12 * bound["seconds"]))
    assert "MFU ceiling" in as_text(result)


def test_state_is_exact_and_shrinks_with_the_mesh(shallow: TrainConfig):
    """Trained parameters and two moments in float32, the frozen tower in bfloat16, and the batch."""
    one, eight = (plan(shallow, f"h200:{n}").bytes_per_chip["arguments"] for n in (1, 8))
    state = one - 128 * (2048 * 17 + 3 * 336 * 336 * 3 + 3 * 576 * 4)
    trained = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096 + 4096 * (1024 + 4096 + 2)
    tower = 2 * (4 * 1024**2 + 2 * 1024 * 4096 + 9 * 1024 + 4096) + 588 * 1024 + (577 + 1 + 4) * 1024
    # Two counters, four bytes each.
    assert state == 12 * trained + 2 * tower + 8
    assert one / 8 < eight < one / 8 + 20e6


def test_what_does_not_fit_comes_with_what_does(shallow: TrainConfig):
    result = plan(apply_override(shallow, "remat=nothing"), "4090:1")
    assert not result.fits
    assert result.bytes_per_chip["headroom"] < 0
    suggestion = result.suggestion
    assert suggestion is not None
    assert suggestion["by"] == "arithmetic"
    changed = shallow
    for override in ("remat=nothing", *suggestion["set"]):
        changed = apply_override(changed, override)
    assert plan(changed, suggestion.get("topology", "4090:1")).fits


def test_the_nearest_that_fits_may_be_more_devices(shallow: TrainConfig):
    one = apply_override(apply_override(shallow, "model.text.hidden_dim=65536"), "data.batch_records=1")
    suggestion = plan(one, "4090:1").suggestion
    assert suggestion is not None
    for override in suggestion["set"]:
        one = apply_override(one, override)
    assert plan(one, suggestion["topology"]).fits
    # Three rows divide among no larger number of these devices.
    three = dataclasses.replace(one, data=dataclasses.replace(one.data, batch_records=None, batch_rows=3))
    assert plan(three, "4090:1").suggestion is None


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data.batch_records=none",), "Set exactly one of data.batch_rows and data.batch_records; got"),
        (("data.batch_rows=16",), "Set exactly one of data.batch_rows and data.batch_records; got"),
        (("data.batch_records=0",), "data.batch_records must be at least 1; got 0"),
        (("data.epochs=none",), "Set exactly one of data.epochs and data.steps"),
        (("mesh.fsdp=0",), "must use all 8 devices"),
    ],
)
def test_what_training_refuses_is_not_planned(shallow: TrainConfig, overrides: tuple[str, ...], says: str):
    for override in overrides:
        shallow = apply_override(shallow, override)
    with pytest.raises(UserError, match=says):
        plan(shallow, "h100:8")


def test_bfloat16_moments_take_half_the_room(shallow: TrainConfig):
    wide, narrow = (plan(apply_override(shallow, f"optim.moments={m}"), "h200:1") for m in ("float32", "bfloat16"))
    saved = wide.bytes_per_chip["arguments"] - narrow.bytes_per_chip["arguments"]
    assert saved == pytest.approx(4 * (wide.bytes_per_chip["gradients"] // 2), rel=1e-6)


def test_adapters_need_no_gradients_of_what_they_adapt(shallow: TrainConfig):
    """Nor its weight gradients' FLOPs: about a third of a step is saved."""
    adapted = plan(_config("llava15_finetune_lora_7b", *SHALLOW), "h100:8")
    whole = plan(shallow, "h100:8")
    assert adapted.bytes_per_chip["gradients"] < whole.bytes_per_chip["gradients"] / 5
    assert 0.6 < adapted.flops / whole.flops < 0.9
    quantized = plan(_config("llava15_finetune_qlora_7b", *SHALLOW), "h100:1")
    assert quantized.flops < adapted.flops * 1.01
    assert quantized.flops <= quantized.executed_flops


@pytest.mark.nightly
@pytest.mark.skipif(not HAS_COMPILER, reason="needs the TPU compiler: pip install -e '.[plan]'")
def test_a_tpu_plan_compiles_the_step():
    command = [sys.executable, "-m", "llava_jax.cli", "plan", "--config", "configs/debug_cpu.py", "--json"]
    small = ["--set", "model.vision.image_size=8", "--set", "data.batch_rows=4"]
    result = subprocess.run(
        [*command, "--topology", "v5e:2x2", *small],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["fits"] is True
    assert found["method"].startswith("compiled by libtpu")
    size = found["bytes_per_chip"]
    total = size["arguments"] + size["outputs"] - size["aliased"] + size["temporaries"] + size["code"]
    assert size["total"] == total
    assert found["hbm_bytes"] == 16 * 2**30
    assert size["headroom"] == 15.75 * 2**30 - total
    assert size["aliased"] > 0, "the state is not donated"
    assert {tuple(c["axes"]) for c in found["collectives"]} == {("fsdp",)}
    assert 0 < found["mfu_ceiling"] < 1


@pytest.mark.nightly
@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize(
    ("topology", "axes"), [("h200:1", set()), ("h100:16", {("fsdp",)}), ("a100-80gb:2", {("fsdp",)})]
)
def test_a_gpu_plan_compiles_the_step(shallow: TrainConfig, topology: str, axes: set[tuple[str, ...]]):
    for override in ("accumulation=8", "stacked=false", "data.batch_records=128"):
        shallow = apply_override(shallow, override)
    result = plan(shallow, topology)
    assert result.method.startswith("compiled by jax-cuda13-pjrt")
    size, count = result.bytes_per_chip, int(topology.partition(":")[2])
    assert size["total"] == size["arguments"] + size["outputs"] - size["aliased"] + size["temporaries"]
    assert size["aliased"] > 0, "the state is not donated"
    assert {tuple(c["axes"]) for c in result.collectives} == axes
    assert result.num_devices == count
    # The arithmetic's state is exact; the compiler leaves out the tower's last layer, which nothing reads.
    assert 0.99 * _state(shallow, count) < size["arguments"] <= _state(shallow, count)


def _state(config: TrainConfig, count: int) -> int:
    """Bytes of what a step is given, by arithmetic."""
    from llava_jax.footprint import estimate
    from llava_jax.plan import _job

    job = _job(config, count)
    return estimate(job.layout, job.batch)[0]["arguments"]


@pytest.mark.nightly
@pytest.mark.usefixtures("gpu_compiler")
@pytest.mark.parametrize("name", GPUS)
def test_every_kind_of_gpu_is_compiled_for(name: str):
    assert targets.no_gpu_compiler(name) is None


@pytest.mark.nightly
@pytest.mark.skipif(not HAS_COMPILER, reason="needs the TPU compiler: pip install -e '.[plan]'")
@pytest.mark.parametrize("name", TPUS)
def test_a_chip_has_the_memory_that_its_compiler_allows(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = _devices(f"{name}:2x2x1" if name in ("v4", "v5p", "tpu7x") else f"{name}:2x2")[0]
    x = jax.ShapeDtypeStruct((2**31, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: jnp.sin(x[::-1])).lower(x).compile()
    size = too_large(str(refused.value), 0)
    assert size is not None
    # What is published of v5p is less.
    assert TPUS[name].usable_bytes == min(size["total"] + size["headroom"], TPUS[name].hbm_bytes)


@pytest.mark.nightly
@pytest.mark.skipif(not HAS_COMPILER, reason="needs the TPU compiler: pip install -e '.[plan]'")
@pytest.mark.parametrize("name", TPUS)
def test_the_devices_of_every_kind_make_a_mesh(name: str, monkeypatch: pytest.MonkeyPatch):
    # As the command line has it: another process may hold the library.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = _devices(f"{name}:2x4x4" if name in ("v4", "v5p", "tpu7x") else f"{name}:4x8")
    for config in (MeshConfig(), MeshConfig(tensor=2), MeshConfig(data=2, tensor=4)):
        assert make_mesh(config, devices).size == len(devices)


@pytest.mark.skipif(HAS_COMPILER, reason="the TPU compiler is installed")
def test_without_the_compiler_it_says_what_to_install(shallow: TrainConfig):
    with pytest.raises(UserError, match=r"pip install -e '\.\[plan\]'"):
        plan(shallow, "v5e:2x2")


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.00G) "
            "exceeds available HBM (15.75G).",
            {"arguments": 5, "temporaries": (26 << 30) - 5, "total": 26 << 30, "headroom": (63 << 28) - (26 << 30)},
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm.",
            {"arguments": 5, "temporaries": (17 << 30) - 5, "total": 17 << 30, "headroom": (63 << 28) - (17 << 30)},
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_a_refusal_of_the_compiler_says_what_would_be_needed(message: str, size: dict[str, int] | None):
    assert too_large(message, 5) == size
