"""Pictures in their slots, records in their rows, and nothing that leaks between them."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.data.conversation import IMAGE_TOKEN
from llava_jax.data.rows import Conversations, Example, Needs
from llava_jax.data.templates import V1
from llava_jax.models.attention import attend_xla, unconstrained
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.llava import place_features
from llava_jax.models.parameters import GraphDef, Parameters, bind, stack_layers
from llava_jax.train.objectives import Context, next_token
from tests.models.oracle import error
from tests.tiny import LLAVA, make_example

# Four features a picture, two layers each: what is tested here does not depend on depth.
SMALL = dataclasses.replace(
    LLAVA,
    vision=dataclasses.replace(LLAVA.vision, image_size=8, num_layers=2),
    text=dataclasses.replace(LLAVA.text, num_layers=2),
)
ROWS = Conversations(template=V1, length=40, tiles=3)
CONTEXT = Context(attend_xla, unconstrained, None)
INPUTS = ("tokens", "images", "patch_slots", "positions", "segment_ids")
Batch = dict[str, jax.Array]


def test_the_example_of_place_features_holds():
    x = jnp.array([[1.0, 2.0, 3.0, 4.0]])[..., None]
    features = jnp.array([[[10.0, 20.0], [30.0, 40.0]]])[..., None]
    placed = place_features(x, features, jnp.array([[[1, 2], [4, 5]]]))
    np.testing.assert_array_equal(placed[0, :, 0], [1.0, 10.0, 20.0, 4.0])


def test_slots_are_those_of_the_patchs_own_row_in_any_order():
    x = jnp.zeros((2, 3, 1))
    features = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])[..., None]
    placed = place_features(x, features, jnp.array([[[2, 0]], [[1, 3]]]))
    np.testing.assert_array_equal(placed[..., 0], [[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])


def test_a_dropped_patch_has_no_gradient_and_a_covered_token_none():
    def total(x, features):
        placed = place_features(x, features, jnp.array([[[1, 4], [5, 6]]]))
        return (placed * jnp.arange(1.0, 5.0)[None, :, None]).sum()

    by_x, by_features = jax.grad(total, argnums=(0, 1))(jnp.ones((1, 4, 1)), jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(by_x[0, :, 0], [1.0, 0.0, 3.0, 4.0])
    np.testing.assert_array_equal(by_features[0, :, :, 0], [[2.0, 0.0], [0.0, 0.0]])


def test_features_take_the_dtype_of_the_row():
    placed = place_features(jnp.zeros((1, 2, 1), jnp.bfloat16), jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1), jnp.int32))
    assert placed.dtype == jnp.bfloat16


def _example(*pieces: int | str, seed: int) -> Example:
    """Pieces: a number of text tokens, or `picture`; the last piece's tokens are the answer."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    images = []
    start = 0
    for piece in pieces:
        start = len(tokens)
        if piece == "picture":
            tokens += [IMAGE_TOKEN] * SMALL.num_features
            images.append(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        else:
            tokens += rng.integers(3, SMALL.text.vocab_size, int(piece)).tolist()
    return make_example(tokens, np.arange(len(tokens)) >= start, images)


TEXT_ONLY = _example(3, 4, seed=1)
ONE = _example(1, "picture", 2, 3, seed=2)
TWO = _example("picture", 2, "picture", 3, 2, seed=3)


@pytest.fixture(scope="module")
def params() -> Parameters:
    values = random_parameters(SMALL, {"tower", "projector", "decoder"}, seed=0)
    # Small embeddings would leave attention nearly uniform, and a leak small.
    values["decoder.embed_tokens.embedding"] *= 20
    return {name: jnp.asarray(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def graphdef() -> GraphDef:
    return structure(SMALL)[0]


@pytest.fixture(scope="module")
def small(needs: Needs) -> Needs:
    return needs._replace(image_size=8, num_features=SMALL.num_features)


@pytest.fixture(scope="module")
def hidden(graphdef: GraphDef) -> Any:
    return jax.jit(lambda params, batch: bind(graphdef, params)(*(batch[name] for name in INPUTS)))


@pytest.fixture(scope="module")
def sums_and_gradients(graphdef: GraphDef) -> Any:
    def total(params, batch):
        sums = next_token(bind(graphdef, params), batch, CONTEXT)
        return sums.loss, sums

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def _batch(rows: Sequence[Sequence[Example]], needs: Needs) -> Batch:
    assembled = [ROWS.assemble(examples, needs) for examples in rows]
    return {name: jnp.asarray(np.stack([row[name] for row in assembled])) for name in assembled[0]}


@pytest.mark.parametrize(
    "packed",
    [[[TEXT_ONLY, ONE, TWO], [], []], [[TWO, ONE], [TEXT_ONLY], []], [[ONE], [TWO, TEXT_ONLY], []]],
    ids=["all in one", "pictures first", "in two rows"],
)
def test_packing_changes_neither_loss_nor_gradient(
    sums_and_gradients: Any, params: Parameters, small: Needs, packed: list[list[Example]]
):
    (_, alone), wanted = sums_and_gradients(params, _batch([[TEXT_ONLY], [ONE], [TWO]], small))
    (_, together), found = sums_and_gradients(params, _batch(packed, small))
    assert together.weight == alone.weight == 9
    assert together.counts["tokens"] == alone.counts["tokens"] == sum(len(e.tokens) for e in (TEXT_ONLY, ONE, TWO))
    assert error(together.loss, alone.loss) <= 1e-5
    assert together.counts["correct"] == alone.counts["correct"]
    for name, value in wanted.items():
        if np.asarray(value).any() and not name.endswith("k_proj.bias"):
            assert error(found[name], value) <= 1e-5, name


def test_the_loss_is_that_of_a_dense_float64_computation(
    hidden: Any, sums_and_gradients: Any, params: Parameters, small: Needs
):
    batch = _batch([[TEXT_ONLY, ONE, TWO], [], []], small)
    (loss, _), _ = sums_and_gradients(params, batch)
    logits = np.asarray(hidden(params, batch), np.float64) @ np.asarray(params["decoder.lm_head.kernel"], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = 0.0
    at = 0
    for example in (TEXT_ONLY, ONE, TWO):
        for i in np.flatnonzero(example.is_answer):
            wanted -= logprobs[0, at + i - 1, example.tokens[i]]
        at += len(example.tokens)
    assert error(loss, wanted) <= 1e-6


def test_a_row_of_padding_weighs_nothing(sums_and_gradients: Any, params: Parameters, small: Needs):
    (_, sums), gradients = sums_and_gradients(params, _batch([[], [], []], small))
    assert sums.loss == sums.weight == sums.counts["tokens"] == sums.counts["correct"] == 0
    assert not any(np.asarray(value).any() for value in gradients.values())


def test_a_picture_reaches_its_own_record_and_no_other(hidden: Any, params: Parameters, small: Needs):
    """Other bytes in one picture: every output of the other records keeps every bit."""
    batch = _batch([[ONE, TEXT_ONLY, TWO], [TWO, ONE], []], small)
    before = np.asarray(hidden(params, batch))
    segments = np.asarray(batch["segment_ids"])
    for row, tile, owner in ((0, 0, 1), (0, 1, 3), (0, 2, 3), (1, 0, 1), (1, 1, 1), (1, 2, 2)):
        changed = batch | {"images": batch["images"].at[row, tile].set(255 - batch["images"][row, tile])}
        differs = (np.asarray(hidden(params, changed)) != before).any(-1)
        own = (segments == owner) & (np.arange(3) == row)[:, None]
        first = int(batch["patch_slots"][row, tile, 0])
        np.testing.assert_array_equal(differs, own & (np.arange(ROWS.length) >= first))


def test_an_unused_tile_reaches_nothing(hidden: Any, params: Parameters, small: Needs):
    batch = _batch([[ONE, TEXT_ONLY], [TEXT_ONLY], []], small)
    changed = batch | {"images": batch["images"].at[0, 1:].set(255).at[1:].set(7)}
    np.testing.assert_array_equal(hidden(params, batch), hidden(params, changed))


def test_no_derivative_crosses_records_through_tokens_or_pictures(graphdef: GraphDef, params: Parameters, small: Needs):
    """d(outputs of one record) / d(token embeddings and patch features of the others) is exactly zero."""
    batch = _batch([[ONE, TEXT_ONLY, TWO]], small)
    d = SMALL.text.embed_dim
    features = jnp.asarray(np.random.default_rng(4).standard_normal((1, 3, SMALL.num_features, d), np.float32))
    probe = jnp.asarray(np.random.default_rng(5).standard_normal((1, ROWS.length, d), np.float32))
    segments = np.asarray(batch["segment_ids"][0])
    owners = segments[np.asarray(batch["patch_slots"][0, :, 0])]
    assert owners.tolist() == [1, 3, 3]

    @jax.jit
    def gradients(embedded, features, keep):
        def total(embedded, features):
            x = place_features(embedded, features, batch["patch_slots"])
            out = bind(graphdef, params).decoder(x, batch["positions"], batch["segment_ids"])
            return (out * probe * keep[..., None]).sum()

        return jax.grad(total, argnums=(0, 1))(embedded, features)

    embedded = params["decoder.embed_tokens.embedding"][batch["tokens"]]
    for target in (1, 2, 3):
        by_token, by_feature = gradients(embedded, features, batch["segment_ids"] == target)
        assert not np.asarray(by_token)[0, segments != target].any()
        assert not np.asarray(by_feature)[0, owners != target].any()
        assert np.asarray(by_token)[0, segments == target].any()
        assert np.asarray(by_feature)[0, owners == target].any() == (target in owners)


def test_the_order_of_rows_and_of_tiles_changes_nothing(hidden: Any, params: Parameters, small: Needs):
    batch = _batch([[ONE, TEXT_ONLY], [TWO], [TEXT_ONLY, TWO]], small)
    before = hidden(params, batch)
    turned = {name: value[::-1] for name, value in batch.items()}
    np.testing.assert_array_equal(hidden(params, turned)[::-1], before)
    swapped = batch | {name: batch[name][:, ::-1] for name in ("images", "patch_slots")}
    np.testing.assert_array_equal(hidden(params, swapped), before)


def test_stacked_layers_compute_what_the_tuple_does(hidden: Any, params: Parameters, small: Needs):
    batch = _batch([[ONE, TEXT_ONLY], [TWO], []], small)
    graphdef = structure(SMALL, stacked=True)[0]
    stacked = jax.jit(lambda params, batch: bind(graphdef, params)(*(batch[name] for name in INPUTS)))
    assert error(stacked(stack_layers(params), batch), hidden(params, batch)) <= 1e-6


def _features(
    params: Parameters, select_layer: int, *, select: str = "patch", broken_from: int, stacked: bool = False
) -> np.ndarray:
    """What a tower reads whose layers from `broken_from` on, and whose last norm, hold NaN."""
    config = dataclasses.replace(SMALL, select_layer=select_layer, select_feature=select)
    broken = tuple(f"tower.layers.{i}." for i in range(broken_from, 2)) + ("tower.post_layernorm.",)
    values = {n: jnp.full_like(v, np.nan) if n.startswith(broken) else v for n, v in params.items()}
    model = bind(structure(config, stacked=stacked)[0], stack_layers(values) if stacked else values)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3)).astype(np.uint8))
    return np.asarray(model.tower.features(images, depth=config.tower_depth, select=select))


def test_the_selected_layer_counts_the_embedding_as_number_zero(params: Parameters):
    """Of two layers, -2 is 1 and -3 is 0; the layers after the selected one are not read."""
    penultimate = _features(params, -2, broken_from=1)
    assert np.isfinite(penultimate).all()
    np.testing.assert_array_equal(penultimate, _features(params, 1, select="cls_patch", broken_from=1)[:, 1:])
    assert np.isfinite(_features(params, -3, broken_from=0)).all()
    assert np.isnan(_features(params, -1, broken_from=1)).all()


def test_a_stack_of_tower_layers_is_cut_at_the_same_layer(params: Parameters):
    assert error(_features(params, -2, broken_from=1, stacked=True), _features(params, -2, broken_from=1)) <= 1e-6


def test_the_identity_projector_places_the_towers_features_as_they_are(params: Parameters):
    config = dataclasses.replace(SMALL, projector="identity")
    graphdef, expected = structure(config)
    model = bind(graphdef, {name: params[name] for name in expected})
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8, 3)).astype(np.uint8))
    x = model.embed(jnp.zeros((1, 6), jnp.int32), images, jnp.array([[[1, 2, 3, 4]]]))
    np.testing.assert_array_equal(x[0, 1:5], model.tower.features(images[0], depth=1, select="patch")[0])


def test_rows_without_tiles_are_text_alone(graphdef: GraphDef, params: Parameters):
    tokens = jnp.array([[5, 6, 7]])
    x = bind(graphdef, params).embed(tokens, jnp.zeros((1, 0, 8, 8, 3), jnp.uint8), jnp.zeros((1, 0, 4), jnp.int32))
    np.testing.assert_array_equal(x, params["decoder.embed_tokens.embedding"][tokens])


def test_newlines_are_written_where_the_mask_says_and_nowhere_else(params: Parameters):
    graphdef = structure(dataclasses.replace(SMALL, image_newline=True))[0]
    newline = jnp.asarray(np.random.default_rng(6).standard_normal(SMALL.text.embed_dim, np.float32))
    tokens = jnp.array([[5, 0, 0, 0, 0, 0, 7, 0]])
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, 1, 8, 8, 3)).astype(np.uint8))
    slots = jnp.array([[[1, 2, 4, 9]]])
    mask = jnp.array([[False, False, False, True, False, True, False, False]])

    def embed(newline, mask):
        return bind(graphdef, params | {"image_newline": newline}).embed(tokens, images, slots, mask)

    with_newlines, without = embed(newline, mask), embed(newline, None)
    np.testing.assert_array_equal(with_newlines[0, [3, 5]], np.stack([newline, newline]))
    np.testing.assert_array_equal(np.delete(with_newlines[0], [3, 5], 0), np.delete(without[0], [3, 5], 0))
    gradient = jax.grad(lambda newline: embed(newline, mask).sum())(newline)
    np.testing.assert_array_equal(gradient, np.full(SMALL.text.embed_dim, 2.0))


SHARDED = """
import dataclasses, json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.llava import place_features
from llava_jax.models.parameters import bind
from llava_jax.train.sharding import MeshConfig, batch_sharding, make_mesh
from tests.models.test_llava import SMALL as LLAVA

mesh = make_mesh(MeshConfig(data=2, fsdp=4))
rows, whole = batch_sharding(mesh), NamedSharding(mesh, P())
rng = np.random.default_rng(0)
b, t, i, p, d = 8, 40, 2, LLAVA.num_features, LLAVA.text.embed_dim
slots = np.stack([rng.permutation(t + 8)[: i * p].reshape(i, p) for _ in range(b)]).astype(np.int32)
x, features = (rng.standard_normal(shape).astype(np.float32) for shape in ((b, t, d), (b, i, p, d)))
tokens = rng.integers(0, 320, (b, t)).astype(np.int32)
images = rng.integers(0, 256, (b, i, 8, 8, 3)).astype(np.uint8)
LLAVA = dataclasses.replace(LLAVA, image_newline=True)
params = random_parameters(LLAVA, {"tower", "projector", "decoder", "image_newline"}, seed=0)
graphdef = structure(LLAVA)[0]
newlines = rng.random((b, t)) < 0.2

def merge_gradient(x, features, slots):
    return jax.grad(lambda *args: (place_features(*args, slots) ** 2).sum(), argnums=(0, 1))(x, features)

def embed(params, tokens, images, slots, newlines):
    return bind(graphdef, params).embed(tokens, images, slots, newlines)

cases = {
    "merge": (place_features, (rows, rows, rows), rows, (x, features, slots)),
    "merge gradient": (merge_gradient, (rows, rows, rows), rows, (x, features, slots)),
    "embed": (embed, (whole, rows, rows, rows, rows), rows, (params, tokens, images, slots, newlines)),
    "control": (lambda x: x - x.mean(0), (rows,), rows, (x,)),
}
words = ("all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter", "collective-broadcast")
found = {}
for name, (function, sharding, out, arguments) in cases.items():
    placed = jax.tree.map(jax.device_put, arguments, tuple(
        jax.tree.map(lambda _: s, a) for s, a in zip(sharding, arguments)))
    compiled = jax.jit(function, in_shardings=sharding, out_shardings=out).lower(*placed).compile()
    text = compiled.as_text()
    alone = jax.jit(function)(*jax.tree.map(jnp.asarray, arguments))
    close = jax.tree.map(lambda a, b: bool(np.allclose(a, b, rtol=1e-5, atol=1e-5)), compiled(*placed), alone)
    found[name] = {"collectives": [w for w in words if w in text], "same": all(jax.tree.leaves(close))}
print(json.dumps({"devices": jax.device_count(), "found": found}))
"""


def test_the_merge_over_eight_devices_needs_no_collective():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 8
    assert {name: case["collectives"] for name, case in result["found"].items()} == {
        "merge": [],
        "merge gradient": [],
        "embed": [],
        "control": ["all-reduce"],
    }
    assert all(case["same"] for case in result["found"].values())
