"""FLOPs are those of the model: by hand, as XLA counts them, and the same however the layers are held."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.chips import KINDS, TPUS
from llava_jax.data.rows import Conversations
from llava_jax.data.templates import V1
from llava_jax.models.parameters import bind
from llava_jax.shapes import LlavaConfig
from llava_jax.train.config import DataConfig, OptimConfig, TrainConfig
from llava_jax.train.flops import executed_flops, matmul_flops, model_flops, seconds_at_peak
from llava_jax.train.objectives import next_token
from llava_jax.train.optim import make_optimizer
from llava_jax.train.sharding import MeshConfig, make_mesh
from llava_jax.train.state import Layout
from llava_jax.train.step import REMAT
from tests.tiny import TEXT, VISION

# Wide enough that sums and norms are a small part of what XLA counts.
WIDE = LlavaConfig(
    vision=dataclasses.replace(VISION, embed_dim=64, hidden_dim=128, num_heads=2),
    text=dataclasses.replace(TEXT, embed_dim=128, hidden_dim=320, num_heads=4, num_kv_heads=2, head_dim=32),
    projector="mlp2x_gelu",
    select_layer=-2,
    select_feature="patch",
    image_newline=False,
)
B, T, TILES = 2, 64, 1


def _layout(trainable: tuple[str, ...], *, stacked: bool = False) -> Layout:
    config = TrainConfig(
        model=WIDE,
        objective=next_token,
        init={"tower": "random", "projector": "random", "decoder": "random"},
        trainable=trainable,
        data=DataConfig(
            records="",
            image_root="",
            tokenizer="",
            rows=Conversations(template=V1, length=T, tiles=TILES),
            batch_rows=B,
        ),
        optim=OptimConfig(learning_rate=1.0),
        compute_dtype="float32",
        stacked=stacked,
        checkpoint_every=1,
        mesh=MeshConfig(),
    )
    return Layout(config, make_optimizer(config.optim, 10), make_mesh(config.mesh))


def _batch() -> dict[str, jax.ShapeDtypeStruct]:
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return {
        "tokens": tokens,
        "targets": tokens,
        "segment_ids": tokens,
        "positions": tokens,
        "is_target": jax.ShapeDtypeStruct((B, T), jnp.bool_),
        "images": jax.ShapeDtypeStruct((B, TILES, 16, 16, 3), jnp.uint8),
        "patch_slots": jax.ShapeDtypeStruct((B, TILES, 16), jnp.int32),
    }


def _parts() -> dict[str, int]:
    """Forward FLOPs of each part, by hand; attention's products apart."""
    text, vision = WIDE.text, WIDE.vision
    d, f, e = text.embed_dim, text.hidden_dim, vision.embed_dim
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    tokens, patches = B * T, B * TILES * vision.num_patches
    # Every tile has a class token besides its patches, and the last of the three layers is not used.
    seen = B * TILES * (vision.num_patches + 1)
    return {
        "linear": text.num_layers * tokens * 2 * (d * (2 * queries + 2 * keys) + 3 * d * f),
        "attention": text.num_layers * B * 4 * T * T * queries // 2,
        "head": 2 * tokens * d * text.vocab_size,
        "projector": 2 * patches * (e * d + d * d),
        "tower": 2 * patches * 48 * e
        + 2 * (2 * seen * (4 * e * e + 2 * e * vision.hidden_dim) + 4 * B * TILES * 17 * 17 * e),
    }


def test_flops_are_those_by_hand():
    parts = _parts()
    decoder = parts["linear"] + parts["attention"] + parts["head"]
    # The first projector layer has no gradient towards the tower, hence two thirds and not three.
    first = 2 * B * TILES * 16 * 64 * 128
    finetune = 3 * decoder + 3 * parts["projector"] - first + parts["tower"]
    assert model_flops(_layout(("projector", "decoder")), _batch()) == finetune
    # A frozen decoder passes gradients back to the pictures, and has none for its weights.
    pretrain = 2 * (parts["linear"] + parts["head"]) + 3 * parts["attention"] + 3 * parts["projector"] - first
    assert model_flops(_layout(("projector",)), _batch()) == pretrain + parts["tower"]


@pytest.mark.parametrize("remat", ["nothing", "everything"])
def test_a_stack_costs_what_its_layers_cost(remat: str):
    apart, stacked = (_layout(("projector", "decoder"), stacked=stacked) for stacked in (False, True))
    assert model_flops(apart, _batch()) == model_flops(stacked, _batch())
    assert executed_flops(apart, _batch(), REMAT[remat]) == executed_flops(stacked, _batch(), REMAT[remat])


def test_a_step_at_peak_is_its_flops_over_those_of_all_devices(monkeypatch: pytest.MonkeyPatch):
    layout = _layout(("projector", "decoder"))
    batch = {name: jnp.zeros(value.shape, value.dtype) for name, value in _batch().items()}
    assert seconds_at_peak(layout, batch) is None
    monkeypatch.setitem(KINDS, jax.devices()[0].device_kind, TPUS["v5e"])
    assert seconds_at_peak(layout, batch) == model_flops(layout, _batch()) / (layout.mesh.size * 197e12)


def test_recomputation_is_executed_and_not_counted_as_the_model():
    layout, parts = _layout(("projector", "decoder")), _parts()
    flops = model_flops(layout, _batch())
    # The loss computes its logits once whatever the layers do.
    assert executed_flops(layout, _batch(), None) == flops
    extra = executed_flops(layout, _batch(), REMAT["everything"]) - flops
    # Nobody asks for a layer's result again, so its last product is not computed again.
    last = WIDE.text.num_layers * B * T * 2 * WIDE.text.hidden_dim * WIDE.text.embed_dim
    assert extra == parts["linear"] - last + parts["attention"]


def test_xla_counts_the_same_and_little_more():
    """XLA's own count of the same gradient, unrolled, attention in full; it adds what is no matrix product.

    Without the head, whose loop over chunks is none that XLA can unroll.
    """
    layout = _layout(("projector", "decoder"))
    trainable, frozen, _ = layout.memory

    def loss(trainable, frozen, batch):
        model = bind(layout.graphdef, trainable | frozen)
        names = ("tokens", "images", "patch_slots", "positions", "segment_ids")
        return (model(*(batch[name] for name in names)) ** 2).sum()

    traced = jax.make_jaxpr(loss)(trainable, frozen, _batch())
    ours = matmul_flops(traced.jaxpr, [i < len(trainable) for i in range(len(traced.jaxpr.invars))])[0]
    theirs = jax.jit(jax.grad(loss)).lower(trainable, frozen, _batch()).cost_analysis()["flops"]
    assert 1.0 <= theirs / ours < 1.06


def test_loops_multiply_and_what_reaches_a_carry_reaches_all_turns():
    def loss(w, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0].sum()

    traced = jax.make_jaxpr(loss)(np.ones((4, 4), np.float32), np.ones((3, 4), np.float32))
    assert matmul_flops(traced.jaxpr, [False, False])[0] == 5 * 2 * 3 * 4 * 4
    assert matmul_flops(traced.jaxpr, [True, False])[0] == 5 * 3 * 2 * 3 * 4 * 4
