"""Every parameter has one rule and its moments lie with it; meshes change no loss and no gradient."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from llava_jax import targets
from llava_jax.compiler import compiler_options
from llava_jax.models.build import structure
from llava_jax.models.lora import LoraConfig
from llava_jax.models.parameters import count
from llava_jax.shapes import CaptionConfig, ClipConfig
from llava_jax.sizes import CLIP_L_336, LLAVA_15_7B, LLAVA_15_13B
from llava_jax.train.config import OptimConfig
from llava_jax.train.optim import make_optimizer
from llava_jax.train.sharding import (
    RULES,
    MeshConfig,
    batch_sharding,
    like_parameters,
    make_constrain,
    make_mesh,
    parameter_shardings,
    partition,
)
from tests.tiny import CLIP, LLAVA
from tests.train.runs import ROOT

# The text tower of openai/clip-vit-large-patch14-336
CLIP_L = ClipConfig(
    vision=CLIP_L_336,
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
    "7b": LLAVA_15_7B,
    "13b": LLAVA_15_13B,
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
        assert len(partition(path)) <= len(value.shape), path


@pytest.mark.parametrize("name", ["tiny", "tiny clip"])
def test_a_layer_lies_as_its_slice_of_the_stack(name: str):
    for path in _parameters(name):
        stack = re.sub(r"(?<=layers)\.\d+", "", path)
        spec = partition(path)
        assert partition(stack) == (P(None, *spec) if stack != path else spec)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["7b", "13b", "clip"])
def test_every_layer_of_a_real_size_has_exactly_one_rule(name: str):
    for path, value in structure(CONFIGS[name])[1].items():
        assert len(partition(path)) <= len(value.shape), path


def test_every_rule_has_a_parameter():
    adapted = structure(LLAVA, lora=LoraConfig(rank=4, alpha=8.0))[1]
    quantized = structure(LLAVA, quantize="nf4")[1]
    paths = {re.sub(r"\.\d+(?=\.)", "", path) for path in (*adapted, *quantized, *_parameters("tiny clip"))}
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
    assert partition("decoder.layers.mlp.up_proj.kernel") == P(None, "fsdp", "tensor")
    assert partition("decoder.layers.2.mlp.up_proj.kernel") == P("fsdp", "tensor")
    assert partition("projector.linear.0.kernel") == partition("projector.linear.1.kernel")


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="0 sharding rules match decoder.up; exactly one must"):
        partition("decoder.up")


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


def test_devices_of_several_slices_are_refused():
    devices = [SimpleNamespace(platform="tpu", slice_index=number // 4) for number in range(8)]
    with pytest.raises(ValueError, match="one TPU slice; got 2"):
        make_mesh(MeshConfig(), devices)


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
import dataclasses, json, re, sys
import jax, jax.numpy as jnp, numpy as np, optax
from llava_jax.data.templates import V1
from llava_jax.data.rows import Conversations
from llava_jax.models.build import random_parameters
from llava_jax.models.parameters import stack_layers
from llava_jax.train import cross_entropy
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.objectives import next_token
from llava_jax.train.sharding import MeshConfig, batch_sharding, make_mesh, process_places, to_devices
from llava_jax.train.state import Layout
from llava_jax.train.step import abstract_tallies, jit_step
from tests.tiny import LLAVA

assert len(jax.devices()) == 8
# A row's logits in four chunks.
cross_entropy.LEAST_CHUNK = 8
MODEL = dataclasses.replace(LLAVA, text=dataclasses.replace(LLAVA.text, num_layers=2))
rng = np.random.default_rng(0)
B, T, I, N = 8, 48, 2, MODEL.num_features
NOWHERE = T + np.arange(I * N, dtype=np.int32).reshape(I, N)

def batch(kind):
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    lengths = [np.unique(row, return_counts=True)[1] for row in segments]
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])
    slots = np.stack([1 + rng.permutation(T - 2)[:I * N].reshape(I, N) for _ in range(B)]).astype(np.int32)
    if kind == "text only":
        slots[:] = NOWHERE
    if kind == "half without images":
        slots[B // 2:] = NOWHERE
    is_target = rng.random((B, T)) < np.linspace(0.05, 0.9, B)[:, None]
    if kind == "images only":
        # Nothing to learn: a row of patches alone.
        is_target[: B // 2] = False
    if kind == "half empty":
        # The last rows of a step; what they hold does not count.
        segments[B // 2:], is_target[B // 2:], slots[B // 2:] = 0, False, NOWHERE
    return {
        "tokens": rng.integers(0, 320, (B, T)).astype(np.int32),
        "targets": rng.integers(0, 320, (B, T)).astype(np.int32),
        "is_target": is_target,
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
        "images": rng.integers(0, 256, (B, I, 16, 16, 3)).astype(np.uint8),
        "patch_slots": slots,
    }

batches = {kind: batch(kind) for kind in ("mixed", "text only", "images only", "half without images", "half empty")}
values = random_parameters(MODEL, ("tower", "projector", "decoder"), seed=0)
# An optimizer whose state is the gradient, lies as moments do, and changes nothing.
keep = optax.GradientTransformation(
    lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p: (jax.tree.map(jnp.zeros_like, g), g)
)

def run(mesh, accumulation, stacked):
    config = TrainConfig(
        model=MODEL, objective=next_token, init=dict.fromkeys(("tower", "projector", "decoder"), "random"),
        trainable=("tower", "projector", "decoder"), optim=OptimConfig(learning_rate=1.0), checkpoint_every=1,
        data=DataConfig(records="", image_root="", tokenizer="", rows=Conversations(template=V1, length=T, tiles=I),
                        batch_rows=B),
        accumulation=accumulation, compute_dtype="float32", stacked=stacked, remat="everything",
    )
    layout = Layout(config, keep, mesh)
    params, _, moments = layout.memory
    # On the host: a step is given its state, and what it is given is gone.
    arrays = jax.device_get(stack_layers(values)) if stacked else values
    lie = lambda name: {n: v.sharding for n, v in name.items()}
    assert lie(params) == lie(moments)
    step = jit_step(layout, keep, most_records=8)
    results = {}
    for kind, rows in batches.items():
        placed = {n: jax.device_put(arrays[n], v.sharding) for n, v in params.items()}
        zeros = {n: jax.device_put(np.zeros(v.shape, v.dtype), v.sharding) for n, v in moments.items()}
        places = process_places(mesh, B, accumulation=accumulation)
        rows = {n: v[places] for n, v in rows.items()}
        rows = to_devices(rows, mesh, places, B, accumulation=accumulation)
        tallies, votes = jax.tree.map(lambda v: jax.device_put(np.zeros(v.shape, v.dtype), v.sharding),
                                      abstract_tallies(mesh, B))
        rows |= tallies
        if kind == "mixed":
            text = step.lower(placed, {}, zeros, rows, votes).compile().as_text()
        new, gradients, metrics = step(placed, {}, zeros, rows, votes)
        assert lie(new) == lie(params) and lie(gradients) == lie(moments)
        assert metrics["computed"] == (0.5 if kind == "half empty" and accumulation > 1 else 1)
        results[kind] = float(metrics["loss"]), {n: np.asarray(g) for n, g in gradients.items()}
    assert step._cache_size() == 1
    shapes = re.findall(r"= \\w+\\[([\\d,]*)\\]\\S* all-gather", text)
    gathered = {int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes}
    # Features and tower states of the whole batch; no parameter has as many elements. Where rows are not divided,
    # every device has them already, and a layer's heads gather what they have computed of them.
    if mesh.shape["data"] * mesh.shape["fsdp"] > 1:
        assert not gathered & {B * I * (N + k) * 32 // accumulation for k in (0, 1)}, shapes
    return results

worst = {}
one = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
meshes = json.loads(sys.argv[1])
base = {stacked: run(one, 1, bool(stacked)) for stacked in {mesh[-1] for mesh in meshes}}
for data, fsdp, tensor, accumulation, stacked in meshes:
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    # Rows are dealt out: micro-batches take them in order, and a step cuts them as it does here.
    num_rows = 6 * data * fsdp * accumulation
    places = process_places(mesh, num_rows, accumulation=accumulation)
    dealt = to_devices({"place": places, "record_ids": places}, mesh, places, num_rows, accumulation=accumulation)
    assert list(dealt) == ["place"] and dealt["place"].sharding == batch_sharding(mesh)
    micro_batches = np.asarray(dealt["place"]).reshape(-1, accumulation).T
    assert (micro_batches.ravel() == np.arange(num_rows)).all(), micro_batches
    found = run(mesh, accumulation, bool(stacked))
    for kind, (loss, gradients) in found.items():
        expected_loss, expected = base[stacked][kind]
        largest = max(np.abs(g).max() for g in expected.values())
        # Zero but for rounding, here and there: a key's bias moves all scores of a query alike, and without
        # pictures nothing reaches the tower.
        idle = [n for n, g in expected.items() if n.endswith("k_proj.bias") or np.abs(g).max() < 1e-7 * largest]
        assert all(np.abs(g[n]).max() < 1e-6 * largest for g in (gradients, expected) for n in idle)
        differences = [np.abs(gradients[n] - g).max() / np.abs(g).max() for n, g in expected.items() if n not in idle]
        name = f"{data}x{fsdp}x{tensor}, {accumulation} micro-batches, stacked {stacked}: {kind}"
        worst[name] = [abs(loss - expected_loss) / expected_loss, float(max(differences))]
print(json.dumps(worst))
"""
SOME = [(2, 2, 2, 2, 1)]
ALL = [
    (data, fsdp, 8 // data // fsdp, accumulation, stacked)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if 8 % (data * fsdp) == 0
    for accumulation, stacked in ((1, 0), (1, 1))
] + [(2, 2, 2, 2, 0), (2, 1, 4, 4, 0)]


@pytest.mark.parametrize("meshes", [SOME, pytest.param(ALL, marks=pytest.mark.nightly)], ids=["one", "all"])
def test_eight_devices_compute_what_one_does(meshes: list[tuple[int, ...]]):
    """The real step, once compiled, on rows with pictures, without, of pictures alone, and half and half."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(meshes)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    differences = json.loads(result.stdout)
    assert len(differences) == 5 * len(meshes)
    for name, (loss, gradient) in differences.items():
        assert loss < 1e-6, name
        assert gradient < 1e-5, name


HEAD_SCRIPT = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from llava_jax.collectives import read_collectives
from llava_jax.train.cross_entropy import chunk_length, cross_entropy
from llava_jax.train.sharding import MeshConfig, batch_sharding, make_mesh

B, T, D, V = 8, 1024, 32, 320
data, fsdp, tensor = json.loads(sys.argv[1])
mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
assert T // chunk_length(T) == 4
rows = batch_sharding(mesh)
head = jax.ShapeDtypeStruct((D, V), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tensor")))
hidden = jax.ShapeDtypeStruct((B, T, D), jnp.float32, sharding=rows)
targets = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)
is_target = jax.ShapeDtypeStruct((B, T), jnp.bool, sharding=rows)
loss = functools.partial(cross_entropy, mesh=mesh)
step = jax.jit(
    jax.grad(loss, (0, 1), has_aux=True), out_shardings=((rows, head.sharding), NamedSharding(mesh, P()))
)
text = step.lower(hidden, head, targets, is_target).compile().as_text()
found = read_collectives(text, dict(mesh.shape))
assert not any("tensor" in c.axes and c.num_bytes == c.count * 4 * D * V for c in found), found
large = [c for c in found if "tensor" not in c.axes and c.num_bytes > 4 * D * V // 16]
print(json.dumps([[c.kind, *c.axes, c.count, c.num_bytes / (4 * D * V)] for c in large]))
"""


@pytest.mark.parametrize("mesh", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_a_head_is_gathered_and_its_gradient_added_up_once(mesh: tuple[int, int, int]):
    """A row's logits come in four chunks; left to the compiler, each would do both. `tensor` cuts the vocabulary."""
    _, fsdp, tensor = mesh
    result = subprocess.run(
        [sys.executable, "-c", HEAD_SCRIPT, json.dumps(mesh)],
        cwd=ROOT,
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(json.loads(result.stdout)) == [
        ["all-gather", "fsdp", 1, 1 / tensor],
        ["all-reduce", "data", 1, 1 / fsdp / tensor],
        ["reduce-scatter", "fsdp", 1, 1 / tensor],
    ]


@pytest.mark.nightly
@pytest.mark.parametrize(("topology", "data"), [("v4:4x4x4", 2), ("v5p:4x4x4", 2), ("v5e:8x8", 1), ("v6e:8x8", 1)])
def test_weights_are_gathered_beside_products_on_a_tpu(topology: str, data: int, tpu: Any):
    """With the options that a step has; of themselves not all compilers do so."""
    del tpu
    mesh = make_mesh(MeshConfig(data=data), targets.tpus(topology))
    up, down = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((4, 4096, 11008), P(None, "fsdp")), ((4, 11008, 4096), P(None, None, "fsdp")))
    )
    x = jax.ShapeDtypeStruct((mesh.size, 2048, 4096), jnp.bfloat16, sharding=batch_sharding(mesh))

    def layers(x: Array, up: Array, down: Array) -> Array:
        def layer(x: Array, kernels: tuple[Array, Array]) -> tuple[Array, None]:
            return make_constrain(mesh)(x + jax.nn.silu(x @ kernels[0]) @ kernels[1]), None

        return jax.lax.scan(layer, x, (up, down))[0]

    options = compiler_options(mesh.devices.flat[0])
    text = jax.jit(layers, compiler_options=options).lower(x, up, down).compile().as_text()
    beside = re.findall(r"^%async_collective_fusion[^{]*\{.*?^\}", text, re.MULTILINE | re.DOTALL)
    assert any(" all-gather(" in fusion for fusion in beside)
    assert " all-reduce(" not in text
