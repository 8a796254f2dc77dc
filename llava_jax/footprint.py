"""Memory and traffic of a step by arithmetic: the larger arrays, summed, for devices without a compiler here."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.collectives import Collective
from llava_jax.models.parameters import part
from llava_jax.shapes import LlavaConfig
from llava_jax.train.cross_entropy import chunk_length
from llava_jax.train.sharding import num_batch_shards
from llava_jax.train.state import Layout, learns


def estimate(layout: Layout, batch: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[dict[str, int], list[Collective]]:
    """Bytes on one device by what they hold, and what devices send each other in a step."""
    config, mesh = layout.config, layout.mesh
    trainable, frozen, _ = layout.memory
    width = jnp.dtype(config.compute_dtype).itemsize
    rows = batch["tokens"].shape[0] // num_batch_shards(mesh) // config.accumulation
    trained = shard_bytes(trainable) // 4
    parts = {
        "arguments": shard_bytes((layout.memory, batch)),
        # The optimizer needs the norm of all gradients before it takes the first; sums of micro-batches are float32.
        "gradients": trained * (width if config.accumulation == 1 else 4 + width),
        "parameters_in_compute_dtype": trained * width if width < 4 else 0,
        "gathered_parameters": _gathered(layout) * width,
    }
    if isinstance(config.model, LlavaConfig):
        parts |= _llava_activations(layout, rows, batch["tokens"].shape[1], batch["images"].shape[1], width)
    else:
        parts["activations"] = _tower_activations(layout, rows, width)
    return parts, _traffic(layout, batch, rows, width)


def _llava_activations(layout: Layout, rows: int, length: int, tiles: int, width: int) -> dict[str, int]:
    config, model = layout.config, layout.config.model
    assert isinstance(model, LlavaConfig), "asked for LLaVAs alone"
    text = model.text
    tensor = layout.mesh.shape["tensor"]
    tokens = rows * length
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    attention = tokens * queries // tensor * width
    linear = tokens * (queries + 2 * keys + 2 * text.hidden_dim) // tensor * width + 2 * tokens * text.embed_dim * width
    scores = rows * text.num_heads // tensor * length * length
    # Scores and weights of plain attention in float32 and compute dtype, and their gradients while a layer is redone.
    nothing = 2 * linear + attention + scores * (4 + width)
    kept = (
        tokens * text.embed_dim * width
        + {
            "everything": 0,
            "linear": attention,
            "elementwise": linear + attention,
            "nothing": nothing,
        }[config.remat]
    )
    is_trained = {"decoder", "projector", "tower"} & set(config.trainable)
    chunk = rows * chunk_length(length) * text.vocab_size // tensor
    head = text.embed_dim * text.vocab_size // tensor
    tower = _tower_activations(layout, rows * tiles, width)
    return {
        "kept_activations": kept * text.num_layers if is_trained else 0,
        "layer_workspace": nothing + scores * 4 + tokens * text.embed_dim * 8,
        "loss_workspace": chunk * 8 + head * (width + (4 if "decoder" in config.trainable else 0)),
        "tower_workspace": tower,
    }


def _tower_activations(layout: Layout, tiles: int, width: int) -> int:
    config, vision = layout.config, layout.config.model.vision
    positions = vision.num_patches + 1
    layer = tiles * positions * (6 * vision.embed_dim + vision.hidden_dim) * width
    layer += tiles * vision.num_heads * positions**2 * (4 + width)
    if "tower" not in config.trainable:
        return layer
    kept = tiles * positions * vision.embed_dim * width
    return vision.num_layers * (layer if config.remat == "nothing" else kept) + layer


def _gathered(layout: Layout) -> int:
    """Elements of two layers' parameters: while one computes, the next arrives."""
    if layout.mesh.shape["fsdp"] == 1:
        return 0
    first = [v for name, v in layout.parameters.items() if name.startswith("decoder.layers.0.")]
    return 2 * sum(v.size for v in first) // layout.mesh.shape["tensor"]


def _traffic(layout: Layout, batch: Mapping[str, Any], rows: int, width: int) -> list[Collective]:
    """Gathers of parameters for each pass, scatters of gradients, sums over data and tensor axes."""
    config, mesh = layout.config, layout.mesh
    values = layout.parameters
    passes = {name: _passes(config, name) * config.accumulation for name in values}
    split = mesh.shape["tensor"]
    found = []

    def add(kind: str, axes: tuple[str, ...], count: int, size: int, times: int = 1) -> None:
        group = math.prod(mesh.shape[axis] for axis in axes)
        if group > 1 and size:
            found.append(Collective(kind, axes, count, size, times * size * (group - 1) // group))

    gathered = sum(v.size * passes[name] for name, v in values.items()) * width // split
    gradients = sum(v.size for name, v in values.items() if learns(name, config)) // split * width
    count = sum(passes.values())
    add("all-gather", ("fsdp",), count, gathered)
    add("reduce-scatter", ("fsdp",), len(values) * config.accumulation, gradients * config.accumulation)
    add("all-reduce", ("data",), len(values), gradients * config.accumulation // mesh.shape["fsdp"], 2)
    if isinstance(config.model, LlavaConfig):
        text = config.model.text
        stream = rows * batch["tokens"].shape[1] * text.embed_dim * width * config.accumulation
        turns = 2 * text.num_layers * (3 if config.remat == "everything" else 2)
        add("all-reduce", ("tensor",), turns * config.accumulation, turns * stream, 2)
    return found


def _passes(config: Any, name: str) -> int:
    """How often a parameter is needed: forward, backward, and forward again if its products are computed again."""
    is_frozen = part(name) in ("tower", "projector") and part(name) not in config.trainable
    # The head's gradient is made with its loss, and the embedding's needs no embedding.
    if is_frozen or ".layers." not in name:
        return 1
    return 2 if config.remat in ("nothing", "elementwise") else 3


def shard_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
