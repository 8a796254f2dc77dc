"""Every parameter has one rule and its moments lie with it; meshes change no loss and no gradient."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.models.build import structure
from llava_jax.models.parameters import count, stack_layers
from llava_jax.shapes import CaptionConfig, ClipConfig, LlavaConfig, TextConfig, VisionConfig
from llava_jax.train.config import MeshConfig, OptimConfig
from llava_jax.train.optim import make_optimizer
from llava_jax.train.sharding import RULES, like_parameters, make_mesh, parameter_shardings, partition
from tests.tiny import CLIP, LLAVA
from tests.train.runs import ROOT

VIT_L = VisionConfig(
    image_size=336,
    patch_size=14,
    embed_dim=1024,
    hidden_dim=4096,
    num_layers=24,
    num_heads=16,
    norm_eps=1e-5,
    activation="quick_gelu",
)


def _vicuna(embed_dim: int, hidden_dim: int, num_layers: int, num_heads: int) -> LlavaConfig:
    text = TextConfig(
        vocab_size=32_000,
        num_layers=num_layers,
        embed_dim=embed_dim,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=128,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-5,
        max_positions=4096,
        tie_embeddings=False,
        sliding_window=None,
    )
    return LlavaConfig(
        vision=VIT_L, text=text, projector="mlp2x_gelu", select_layer=-2, select_feature="patch", image_newline=False
    )


CLIP_L = ClipConfig(
    vision=VIT_L,
    caption=CaptionConfig(
        vocab_size=49_408,
        context_length=77,
        embed_dim=768,
        hidden_dim=3072,
        num_layers=12,
        num_heads=12,
        norm_eps=1e-5,
        activation="quick_gelu",
        eos_id=49_407,
    ),
    projection_dim=768,
)
CONFIGS = {
    "tiny": LLAVA,
    "tiny clip": CLIP,
    "7b": _vicuna(4096, 11_008, 32, 32),
    "13b": _vicuna(5120, 13_824, 40, 40),
    "clip": CLIP_L,
}


def _with_layers(config, number: int):
    """The shape with few layers of real width: forty take a minute to describe, and follow no other rule."""
    changes = {"vision": dataclasses.replace(config.vision, num_layers=number)}
    for field in ("text", "caption"):
        if hasattr(config, field):
            changes[field] = dataclasses.replace(getattr(config, field), num_layers=number)
    return dataclasses.replace(config, **changes)


@functools.cache
def _parameters(name: str, num_layers: int = 2) -> dict:
    return structure(_with_layers(CONFIGS[name], num_layers))[1]


def _mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of any shape to compute with; its one device stands in for all."""
    devices = np.array(jax.devices()[:1] * (data * fsdp * tensor))
    return Mesh(devices.reshape(data, fsdp, tensor), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_exactly_one_rule(name: str):
    for path, value in _parameters(name).items():
        assert len(partition(path, value.shape)) <= len(value.shape), path


@pytest.mark.parametrize("name", ["tiny", "tiny clip"])
def test_a_layer_lies_as_its_slice_of_the_stack(name: str):
    apart = _parameters(name)
    stacked = jax.eval_shape(stack_layers, apart)
    for path, value in apart.items():
        stack = re.sub(r"(?<=layers)\.\d+", "", path)
        spec = partition(path, value.shape)
        assert partition(stack, stacked[stack].shape) == (P(None, *spec) if stack != path else spec)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["7b", "13b", "clip"])
def test_every_layer_of_a_real_size_has_exactly_one_rule(name: str):
    for path, value in structure(CONFIGS[name])[1].items():
        assert len(partition(path, value.shape)) <= len(value.shape), path


def test_every_rule_has_a_parameter():
    paths = {re.sub(r"\.\d+(?=\.)", "", path) for name in ("tiny", "tiny clip") for path in _parameters(name)}
    for pattern, _ in RULES:
        assert any(re.fullmatch(pattern, path) for path in paths), pattern


@pytest.mark.parametrize(("name", "decoder", "d"), [("7b", 6_738_415_616, 4096), ("13b", 13_015_864_320, 5120)])
def test_parameter_counts_are_the_published_ones(name: str, decoder: int, d: int):
    """Vicuna's, and the 303,507,456 of the tower; counts grow by the same with every layer of a kind."""

    def counted(num_layers: int, kind: str) -> int:
        return sum(v.size for n, v in _parameters(name, num_layers).items() if n.startswith(kind))

    found = {}
    for kind, num_layers in (("decoder", CONFIGS[name].text.num_layers), ("tower", CONFIGS[name].vision.num_layers)):
        two, three = counted(2, kind), counted(3, kind)
        found[kind] = two + (num_layers - 2) * (three - two)
    assert found == {"decoder": decoder, "tower": 303_507_456}
    assert counted(2, "projector") == d * (1024 + d + 2)


@pytest.mark.parametrize("name", ["7b", "13b"])
@pytest.mark.parametrize("axes", [(1, 256, 1), (1, 64, 4), (2, 16, 8)], ids=str)
def test_published_sizes_fit_pod_meshes(name: str, axes: tuple[int, int, int]):
    mesh = _mesh(*axes)
    parameters = _parameters(name)
    total = 0
    for path, sharding in parameter_shardings(parameters, mesh).items():
        total += int(np.prod(sharding.shard_shape(parameters[path].shape)))
    # Norms, biases and positions are whole everywhere, under a million of them; the rest is cut by fsdp x tensor.
    assert total < count(parameters) / (axes[1] * axes[2]) + 1_000_000


def test_a_stack_has_its_layer_axis_on_no_mesh_axis():
    assert partition("decoder.layers.mlp.up_proj.kernel", (3, 8, 8)) == P(None, "fsdp", "tensor")
    assert partition("decoder.layers.2.mlp.up_proj.kernel", (8, 8)) == P("fsdp", "tensor")
    assert partition("projector.linear.0.kernel", (8, 8)) == partition("projector.linear.1.kernel", (8, 8))


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="0 sharding rules match decoder.up; exactly one must"):
        partition("decoder.up", (2,))


def test_dimensions_that_an_axis_does_not_divide_are_listed():
    mesh = _mesh(1, 1, 7)
    with pytest.raises(ValueError, match=r"decoder.embed_tokens.embedding \(320, 32\) over tensor=7.*another mesh"):
        parameter_shardings(_parameters("tiny"), mesh)


@pytest.mark.parametrize(
    "config",
    [MeshConfig(fsdp=3), MeshConfig(data=-1), MeshConfig(data=2), MeshConfig(data=0), MeshConfig(fsdp=-2)],
    ids=str,
)
def test_a_mesh_that_does_not_use_all_devices_is_refused(config: MeshConfig):
    with pytest.raises(ValueError, match="must use all 1 devices"):
        make_mesh(config)


def test_moments_lie_as_their_parameters():
    mesh = _mesh(1, 1, 1)
    parameters = _parameters("tiny")
    shardings = parameter_shardings(parameters, mesh)
    state = jax.eval_shape(make_optimizer(OptimConfig(learning_rate=1.0), 10).init, parameters)
    placed = like_parameters(state, shardings, mesh)
    found = 0
    for path, sharding in jax.tree_util.tree_leaves_with_path(placed):
        key = getattr(path[-1], "key", None)
        assert sharding == shardings.get(key, NamedSharding(mesh, P())), path
        found += key in shardings
    assert found == 2 * len(parameters)


SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
from llava_jax.models.attention import attend_xla
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.parameters import stack_layers
from llava_jax.train.config import MeshConfig
from llava_jax.train.objectives import Context, next_token
from llava_jax.train.sharding import batch_sharding, make_constrain, make_mesh, parameter_shardings
from llava_jax.train.step import make_step
from tests.tiny import LLAVA

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
b, t = 8, 64
segments = np.sort(rng.integers(1, 4, (b, t)), axis=1).astype(np.int32)
positions = np.stack([np.concatenate([np.arange(n) for n in np.unique(r, return_counts=True)[1]]) for r in segments])
slots = np.stack([1 + rng.permutation(t - 2)[:32].reshape(2, 16) for _ in range(b)])
batch = {
    "tokens": rng.integers(0, 320, (b, t)).astype(np.int32),
    "targets": rng.integers(0, 320, (b, t)).astype(np.int32),
    "is_target": rng.random((b, t)) < np.linspace(0.05, 0.9, b)[:, None],
    "segment_ids": segments,
    "positions": positions.astype(np.int32),
    "images": rng.integers(0, 256, (b, 2, 16, 16, 3)).astype(np.uint8),
    "patch_slots": slots.astype(np.int32),
}
values = random_parameters(LLAVA, ("tower", "projector", "decoder"), seed=0)
keep = optax.GradientTransformation(lambda p: p, lambda g, s, p: (jax.tree.map(jnp.zeros_like, g), g))

def run(mesh, accumulation, stacked):
    shardings = parameter_shardings(values, mesh)
    params = {n: jax.device_put(v, shardings[n]) for n, v in values.items()}
    if stacked:
        params = stack_layers(params)
        shardings = parameter_shardings(params, mesh)
        params = {n: jax.device_put(v, shardings[n]) for n, v in params.items()}
    arrays = {n: jax.device_put(v, batch_sharding(mesh)) for n, v in batch.items()}
    context = Context(attend=attend_xla, constrain=make_constrain(mesh), remat=None)
    step = make_step(structure(LLAVA, stacked=stacked)[0], next_token, keep, context=context,
                     accumulation=accumulation, compute_dtype="float32")
    step = jax.jit(step, out_shardings=(shardings, shardings, None))
    _, gradients, metrics = step(params, {}, params, arrays)
    return float(metrics["loss"]), {n: np.asarray(g) for n, g in gradients.items()}

results = {}
one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
base = {stacked: run(one, 1, stacked) for stacked in {bool(mesh[-1]) for mesh in json.loads(sys.argv[1])}}
for data, fsdp, tensor, accumulation, stacked in json.loads(sys.argv[1]):
    loss, gradients = run(make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor)), accumulation, bool(stacked))
    expected_loss, expected = base[bool(stacked)]
    largest = max(np.abs(g).max() for g in expected.values())
    # A key's bias moves all scores of a query alike: its gradient is zero but for rounding, here and there.
    idle = [n for n in expected if n.endswith("k_proj.bias")]
    assert all(np.abs(g[n]).max() < 1e-6 * largest for g in (gradients, expected) for n in idle)
    worst = max(np.abs(gradients[n] - g).max() / (np.abs(g).max() or 1.0) for n, g in expected.items() if n not in idle)
    name = f"{data}x{fsdp}x{tensor}/{accumulation}/{stacked}"
    results[name] = [abs(loss - expected_loss) / expected_loss, float(worst)]
print(json.dumps(results))
"""
MESHES = [(1, 8, 1, 1, 0), (2, 2, 2, 2, 0)]
MORE = [(8, 1, 1, 1, 0), (1, 2, 4, 1, 0), (2, 2, 2, 2, 1), (4, 2, 1, 1, 1), (2, 1, 4, 4, 0)]


def _differences(meshes: list[tuple[int, ...]]) -> dict[str, list[float]]:
    flags = "--xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(meshes)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("meshes", [MESHES, pytest.param(MORE, marks=pytest.mark.nightly)], ids=["some", "more"])
def test_eight_devices_compute_what_one_does(meshes: list[tuple[int, ...]]):
    differences = _differences(meshes)
    assert len(differences) == len(meshes)
    for mesh, (loss, gradient) in differences.items():
        assert loss < 1e-6, mesh
        assert gradient < 1e-5, mesh
