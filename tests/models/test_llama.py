"""The decoder: causality, packing, shifts, and the cache that must change nothing."""

import dataclasses
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.compiler import compiler_options
from llava_jax.models.build import initial_value, structure
from llava_jax.models.llama import NOWHERE, Cache, Llama, empty_cache
from llava_jax.models.parameters import GraphDef, Parameters, bind, skeleton, stack_layers
from llava_jax.shapes import TextConfig
from llava_jax.sizes import DEBUG
from llava_jax.train.step import cast
from tests.models.oracle import error
from tests.tiny import TEXT

WINDOW = dataclasses.replace(TEXT, sliding_window=3)
LENGTH = 9


def _graphdef(config: TextConfig, *, stacked: bool = False) -> tuple[GraphDef, Parameters]:
    return skeleton(lambda: Llama(config, stacked=stacked, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def params() -> Parameters:
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(initial_value(name, value.shape, rng)) for name, value in _graphdef(TEXT)[1].items()}


@pytest.fixture(scope="module")
def decoder(params: Parameters) -> Any:
    return bind(_graphdef(TEXT)[0], params)


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, LENGTH, TEXT.embed_dim), np.float32))


@pytest.fixture(scope="module")
def run(decoder: Any) -> Any:
    return jax.jit(lambda x, positions, segments: decoder(x, positions, segments))


POSITIONS = jnp.tile(jnp.arange(LENGTH), (2, 1))
WHOLE = jnp.ones((2, LENGTH), jnp.int32)
# Two records and padding in each row, cut at different places.
SEGMENTS = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 2, 0, 0]])
PACKED = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 0], [0, 1, 0, 1, 2, 3, 4, 0, 0]])


def test_future_tokens_do_not_reach_the_past(run: Any, x: jax.Array):
    before = run(x, POSITIONS, WHOLE)
    after = run(x.at[:, 5:].set(99.0), POSITIONS, WHOLE)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.array_equal(before[:, 5:], after[:, 5:])


def test_one_segment_is_no_segment(decoder: Any, run: Any, x: jax.Array):
    np.testing.assert_array_equal(jax.jit(decoder)(x, POSITIONS), run(x, POSITIONS, WHOLE))


def test_shifting_all_positions_changes_nothing(run: Any, x: jax.Array):
    assert error(run(x, POSITIONS + 37, WHOLE), run(x, POSITIONS, WHOLE)) <= 1e-5


def test_order_alone_would_not_do(run: Any, x: jax.Array):
    """Stretched distances give other outputs: positions are used."""
    assert error(run(x, POSITIONS * 5, WHOLE), run(x, POSITIONS, WHOLE)) > 1e-3


@pytest.mark.parametrize("source", [1, 2, 0])
def test_no_derivative_crosses_segments(run: Any, x: jax.Array, source: int):
    """d(outputs of the other segments) / d(embeddings of `source`) is exactly zero, d(its own) is not."""
    others = (source != SEGMENTS)[..., None]
    probe = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape, np.float32))
    by_others, by_own = (
        jax.grad(lambda x, keep: (run(x, PACKED, SEGMENTS) * probe * keep).sum())(x, keep) for keep in (others, ~others)
    )
    own = np.asarray(source == SEGMENTS)
    assert not np.asarray(by_others)[own].any()
    assert not np.asarray(by_own)[~own].any()
    assert np.asarray(by_own)[own].any()


def test_a_packed_record_gets_what_it_gets_alone(run: Any, x: jax.Array):
    packed = run(x, PACKED, SEGMENTS)
    for row, start, end in ((0, 0, 4), (0, 4, 8), (1, 0, 2), (1, 2, 7)):
        alone = jnp.zeros_like(x).at[0, : end - start].set(x[row, start:end])
        segments = (jnp.arange(LENGTH) < end - start).astype(jnp.int32)
        found = run(alone, POSITIONS, jnp.stack([segments, segments]))[0, : end - start]
        assert error(found, packed[row, start:end]) <= 1e-5


def test_a_window_hides_what_lies_further_back(params: Parameters, x: jax.Array):
    """Three layers of window 3 reach 6 tokens back, and not one further."""
    decoder = bind(_graphdef(WINDOW)[0], params)
    gradient = jax.jit(jax.grad(lambda x: decoder(x, POSITIONS)[:, 8].sum()))(x)
    reached = np.asarray(gradient).any(axis=(0, 2))
    np.testing.assert_array_equal(reached, np.arange(LENGTH) >= 8 - 3 * 2)


def test_a_stack_of_layers_computes_what_the_tuple_does(params: Parameters, run: Any, x: jax.Array):
    stacked = bind(_graphdef(TEXT, stacked=True)[0], stack_layers(params))
    found = jax.jit(lambda x: stacked(x, PACKED, SEGMENTS))(x)
    assert error(found, run(x, PACKED, SEGMENTS)) <= 1e-6


def test_recomputing_layers_changes_no_gradient(decoder: Any, x: jax.Array):
    probe = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape, np.float32))

    def gradient(remat):
        return jax.jit(jax.grad(lambda x: (decoder(x, PACKED, SEGMENTS, remat=remat) * probe).sum()))(x)

    assert error(gradient(jax.checkpoint), gradient(None)) <= 1e-6


def test_activations_are_constrained_at_the_embedding_and_after_every_layer(decoder: Any, x: jax.Array):
    seen = []

    def constrain(x):
        seen.append(x.shape)
        return x

    jax.eval_shape(lambda x: decoder(x, POSITIONS, constrain=constrain), x)
    assert seen == [x.shape] * (TEXT.num_layers + 1)


@pytest.mark.parametrize("config", [TEXT, WINDOW], ids=["full", "window"])
def test_a_cache_filled_in_pieces_gives_what_the_whole_sequence_does(
    params: Parameters, config: TextConfig, x: jax.Array
):
    """Row 0 is prefilled with 5 tokens, row 1 with 3 and two of padding; then both go on token by token."""
    decoder = bind(_graphdef(config)[0], params)
    full = jax.jit(decoder)(x, POSITIONS)
    extend = jax.jit(decoder.extend)
    lengths = jnp.array([5, 3])
    prompt = jnp.where(jnp.arange(5)[None, :, None] < lengths[:, None, None], x[:, :5], 77.0)
    cache = empty_cache(config, batch=2, length=12, dtype=jnp.float32)
    hidden, cache = extend(prompt, jnp.where(jnp.arange(5) < lengths[:, None], POSITIONS[:, :5], NOWHERE), cache)
    for row, length in enumerate((5, 3)):
        assert error(hidden[row, :length], full[row, :length]) <= 1e-5
    for _ in range(4):
        new = jnp.take_along_axis(x, lengths[:, None, None], axis=1)
        hidden, cache = extend(new, lengths[:, None], cache)
        assert error(hidden[:, 0], jnp.take_along_axis(full, lengths[:, None, None], axis=1)[:, 0]) <= 1e-5
        lengths += 1


def test_a_cache_that_grows_keeps_what_it_holds(decoder: Any, x: jax.Array):
    tight = empty_cache(TEXT, batch=2, length=4, dtype=jnp.float32)
    _, tight = jax.jit(decoder.extend)(x[:, :4], POSITIONS[:, :4], tight)
    hidden, _ = jax.jit(decoder.extend)(x[:, 4:5], POSITIONS[:, 4:5], tight.grow(9))
    assert error(hidden[:, 0], jax.jit(decoder)(x, POSITIONS)[:, 4]) <= 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_of_decoding_copies_no_cache(decoder: Any, batch: int):
    length = 37

    def decode(x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        def step(_: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
            x, cache = carry
            return decoder.extend(x, jnp.full((batch, 1), cache.filled), cache)

        return jax.lax.fori_loop(0, length, step, (x, cache))

    cache = empty_cache(TEXT, batch=batch, length=length, dtype=jnp.float32)
    # As users' programs are compiled, which these tests' are not.
    emitters = "xla_cpu_use_fusion_emitters"
    options = compiler_options(jax.devices()[0]) or {}
    options |= {emitters: True} if emitters in os.environ["XLA_FLAGS"] else {}
    program = jax.jit(decode, donate_argnames="cache", compiler_options=options)
    text = program.lower(jnp.zeros((batch, 1, TEXT.embed_dim)), cache).compile().as_text()
    shapes = re.findall(r"= f32\[([0-9,]+)\]\S* (?:copy|transpose|concatenate)\(", text)
    assert cache.layers[0].k.size not in [math.prod(map(int, shape.split(","))) for shape in shapes]


def test_a_tied_head_is_the_embedding_turned(params: Parameters):
    config = dataclasses.replace(TEXT, tie_embeddings=True)
    graphdef, expected = _graphdef(config)
    tied = {name: value for name, value in params.items() if name in expected}
    assert "lm_head.kernel" not in expected
    np.testing.assert_array_equal(bind(graphdef, tied).head(), params["embed_tokens.embedding"].T)


def test_it_computes_in_the_dtype_that_it_is_bound_to():
    """Not in the one that it was made with: float32 in one place would make all after it float32."""
    graphdef, values = structure(DEBUG)

    def hidden(values, tokens):
        decoder = bind(graphdef, cast(values, "bfloat16")).decoder
        return decoder(decoder.embed_tokens(tokens), jnp.broadcast_to(jnp.arange(8), tokens.shape))

    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    assert jax.eval_shape(hidden, values, tokens).dtype == jnp.bfloat16
