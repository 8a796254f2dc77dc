"""Who sees whom: masks by hand, and attention that depends on nothing else."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.compiler import compiler_options
from llava_jax.models.attention import Attend, Scope, attend_whole, attend_xla
from llava_jax.models.llama import Rotary, _turned, _turned_by_shifts, rotary, rotate
from llava_jax.models.streamed import attend_streamed


def _row(*values: int) -> jax.Array:
    return jnp.array([values])


def _random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


PACKED = {
    "query_segments": _row(1, 1, 1, 2, 2, 0),
    "key_segments": _row(1, 1, 1, 2, 2, 0),
    "query_positions": _row(0, 1, 2, 0, 1, 0),
    "key_positions": _row(0, 1, 2, 0, 1, 0),
}


def test_the_example_of_scope_holds():
    mask = Scope(**PACKED, causal=True).mask()
    assert mask is not None
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    np.testing.assert_array_equal(mask[0], np.array(expected, bool))


def test_a_window_counts_the_query_itself():
    positions = jnp.arange(5)[None]
    scope = Scope(query_positions=positions, key_positions=positions, causal=True, window=2)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(scope.mask()[0], np.array(expected, bool))


def test_segments_alone_let_tokens_look_both_ways():
    scope = Scope(query_segments=_row(1, 1, 2), key_segments=_row(1, 1, 2))
    np.testing.assert_array_equal(scope.mask()[0], np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool))


def test_nothing_restricts_an_empty_scope():
    assert Scope().mask() is None


def test_a_cache_is_seen_up_to_the_queries_position():
    scope = Scope(query_positions=jnp.array([[2], [0]]), key_positions=jnp.tile(jnp.arange(4), (2, 1)), causal=True)
    np.testing.assert_array_equal(scope.mask()[:, 0], np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool))


def test_two_keys_are_weighed_as_by_hand():
    """Scores q.k / sqrt(4) = 0 and ln 3, hence weights 1/4 and 3/4."""
    q = jnp.array([[[[2.0, 0.0, 0.0, 0.0]]]])
    k = jnp.array([[[[0.0, 1.0, 0.0, 0.0]], [[np.log(3.0), 0.0, 0.0, 0.0]]]], jnp.float32)
    v = jnp.array([[[[4.0, 0.0, 0.0, 0.0]], [[0.0, 8.0, 0.0, 0.0]]]])
    np.testing.assert_allclose(attend_xla(q, k, v, Scope())[0, 0, 0], [1.0, 6.0, 0.0, 0.0], rtol=1e-6)


def test_query_heads_share_the_key_head_of_their_group():
    """Heads 0 and 1 read key head 0, heads 2 and 3 key head 1, as `repeat_kv` of transformers lays them out."""
    q, k, v = _random(0, 2, 5, 4, 8), _random(1, 2, 5, 2, 8), _random(2, 2, 5, 2, 8)
    grouped = attend_xla(q, k, v, Scope())
    repeated = attend_xla(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), Scope())
    np.testing.assert_allclose(grouped, repeated, rtol=1e-6, atol=1e-6)


def test_attention_is_that_of_jax():
    q, k, v = _random(0, 1, 6, 4, 8), _random(1, 1, 6, 2, 8), _random(2, 1, 6, 2, 8)
    scope = Scope(**PACKED, causal=True)
    expected = jax.nn.dot_product_attention(q, k, v, mask=scope.mask()[:, None])
    np.testing.assert_allclose(attend_xla(q, k, v, scope), expected, rtol=1e-6, atol=1e-6)


def test_no_derivative_crosses_a_segment_or_comes_from_the_future():
    q, k, v = _random(0, 1, 6, 2, 4), _random(1, 1, 6, 2, 4), _random(2, 1, 6, 2, 4)
    scope = Scope(**PACKED, causal=True)
    by_key, by_value = jax.jacobian(lambda k, v: attend_xla(q, k, v, scope)[0].sum((1, 2)), argnums=(0, 1))(k, v)
    hidden = ~np.asarray(scope.mask()[0])
    for derivative in (by_key, by_value):
        assert not np.asarray(derivative)[:, 0][hidden].any()
    assert np.asarray(by_value)[:, 0][~hidden].any()


def test_hidden_keys_may_hold_anything_finite():
    q, k, v = _random(0, 1, 6, 2, 4), _random(1, 1, 6, 2, 4), _random(2, 1, 6, 2, 4)
    scope = Scope(**PACKED, causal=True)
    before = attend_xla(q, k, v, scope)
    after = attend_xla(q, k.at[:, 3:].mul(1e9), v.at[:, 3:].set(-1e30), scope)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("slots", [1, 7, 12])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 2), (1, 6), (2, 6), (1, 18)])
def test_streamed_attention_is_attention(tokens: int, heads: int, slots: int, dtype: Any):
    """Two key heads; nine queries of one, in the last case, are more than are streamed."""
    q, k, v = (_random(i, 3, n, m, 8).astype(dtype) for i, (n, m) in enumerate([(tokens, heads), *[(slots, 2)] * 2]))
    late = jnp.array([[slots], [slots // 2], [0]]) + jnp.arange(tokens)
    scope = Scope(query_positions=late, key_positions=jnp.tile(jnp.arange(slots), (3, 1)), causal=True)
    options = compiler_options(jax.devices()[0], in_any_order=True)
    found = jax.jit(lambda q, k, v: attend_streamed(q, k, v, scope), compiler_options=options)(q, k, v)
    expected = attend_whole(q, k, v, scope)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(*map(np.float32, (found, expected)), rtol=0, atol={2: 0.02, 4: 2e-6}[found.itemsize])


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("length", [129, 300, 1500])
def test_blocks_of_queries_are_the_whole(length: int, window: int | None):
    """Three records and padding, in a row that is no multiple of a block; results of records, and gradients."""
    q, k, v = _random(0, 1, length, 4, 8), _random(1, 1, length, 2, 8), _random(2, 1, length, 2, 8)
    ends = np.array([length // 3, length // 2, length - 7, length])
    segments = jnp.array(np.repeat([1, 2, 3, 0], np.diff(ends, prepend=0)))[None]
    positions = jnp.array(np.concatenate([np.arange(n) for n in np.diff(ends, prepend=0)]))[None] * (segments > 0)
    scope = Scope(segments, segments, positions, positions, causal=True, window=window)
    assert "concatenate" in str(jax.make_jaxpr(lambda q, k, v: attend_xla(q, k, v, scope))(q, k, v))

    def total(attend: Attend, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = attend(q, k, v, scope) * (segments > 0)[:, :, None, None]
        return (mixed * _random(3, *mixed.shape)).sum(), mixed

    found, expected = (
        jax.jit(jax.grad(functools.partial(total, attend), argnums=(0, 1, 2), has_aux=True))(q, k, v)
        for attend in (attend_xla, attend_whole)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)


def test_bfloat16_inputs_are_softmaxed_in_float32():
    """1 + 2^-9 is no bfloat16; 256 equal weights of 1/256 would be lost in a bfloat16 sum."""
    q, k = jnp.zeros((1, 1, 1, 4), jnp.bfloat16), jnp.zeros((1, 257, 1, 4), jnp.bfloat16)
    scores = jax.make_jaxpr(lambda q, k, v: attend_xla(q, k, v, Scope()))(q, k, k)
    exps = [equation for equation in scores.eqns if equation.primitive.name == "exp"]
    assert not exps or all(equation.outvars[0].aval.dtype == jnp.float32 for equation in exps)
    assert "exp" in str(scores)
    assert attend_xla(q, k, jnp.ones_like(k), Scope()).dtype == jnp.bfloat16


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_scores_depend_on_distances_not_on_positions(shift: int):
    q, k = _random(0, 1, 5, 2, 8), _random(1, 1, 5, 2, 8)
    positions = jnp.arange(5)[None]

    def scores(positions: jax.Array) -> jax.Array:
        angles = rotary(positions, head_dim=8, theta=10_000.0)
        return jnp.einsum("btnh,bsnh->bnts", rotate(q, angles), rotate(k, angles))

    # Angles of position 1000 are rounded to 2^-14; nothing else differs.
    np.testing.assert_allclose(scores(positions), scores(positions + shift), atol=2e-6 * max(shift, 10))


def test_position_zero_turns_nothing_and_a_quarter_turn_swaps_the_halves():
    x = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])
    np.testing.assert_array_equal(rotate(x, rotary(_row(0), head_dim=4, theta=10.0)), x)
    quarter = jnp.full((1, 1, 4), jnp.pi / 2)
    turned = rotate(x, type(rotary(_row(0), head_dim=4, theta=10.0))(jnp.cos(quarter), jnp.sin(quarter)))
    np.testing.assert_allclose(turned[0, 0, 0], [-3.0, -4.0, 1.0, 2.0], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_halves_turn_alike_on_every_platform(dtype: Any):
    x = _random(0, 2, 5, 3, 8).astype(dtype)
    np.testing.assert_array_equal(_turned(x), _turned_by_shifts(x))
    first, second = np.split(x, 2, axis=-1)
    np.testing.assert_array_equal(_turned(x), np.concatenate([-second, first], axis=-1))


def test_cosines_are_computed_once_for_all_heads_and_uses():
    x, positions = _random(0, 1, 64, 4, 32), jnp.arange(64)[None]

    def run(x: jax.Array, positions: jax.Array) -> jax.Array:
        angles = rotary(positions, head_dim=32, theta=10_000.0)
        for _ in range(3):
            x = jnp.einsum("btnh,bsnh->btsn", rotate(x, angles), rotate(-x, angles)).sum(2)[..., None] * x
        return x

    compiled = jax.jit(run).lower(x, positions).compile().as_text()
    assert re.findall(r"f32\[([0-9,]+)\]\S* cosine\(", compiled) == ["1,64,16"]


@pytest.mark.nightly
def test_turning_writes_no_halves_on_a_tpu(tpu: Any):
    """Compiled for v5e at the width of a 7B decoder, with the gradient: operands and results are all it needs."""
    here = jax.sharding.SingleDeviceSharding(tpu)
    x = jax.ShapeDtypeStruct((2, 2048, 32, 128), jnp.bfloat16, sharding=here)
    cosines = jax.ShapeDtypeStruct((2, 2048, 128), jnp.float32, sharding=here)

    def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return rotate(x, Rotary(cos, sin))

    def gradient(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: turn(x, cos, sin), x)[1](x)[0]

    for program in (turn, gradient):
        memory = jax.jit(program).lower(x, cosines, cosines).compile().memory_analysis()
        assert memory.temp_size_in_bytes == 0


def test_angles_are_float32_so_that_late_positions_stay_apart():
    angles = rotary(_row(256, 257), head_dim=4, theta=10_000.0)
    assert angles.cos.dtype == jnp.float32
    np.testing.assert_allclose(angles.cos[0, 1, [0, 2]], np.cos(257.0), atol=1e-5)
    np.testing.assert_allclose(angles.sin[0, 1, [1, 3]], np.sin(2.57), atol=1e-6)
