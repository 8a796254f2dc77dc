"""Layers that all networks share, beside what their networks' tests show of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from llava_jax import targets
from llava_jax.models.layers import Embed, _sums_by_products, _sums_by_scatter

# No multiple of the eight parts in which products take it.
NUM_VECTORS, WIDTH = 37, 6
IDS = np.random.default_rng(0).integers(0, NUM_VECTORS, (3, 50))


@pytest.mark.parametrize("sums", [_sums_by_scatter, _sums_by_products])
def test_gradients_of_a_vectors_uses_are_added_up(sums):
    gradient = np.random.default_rng(1).standard_normal((IDS.size, WIDTH)).astype(np.float32)
    expected = np.zeros((NUM_VECTORS, WIDTH), np.float32)
    np.add.at(expected, IDS.ravel(), gradient)
    found = sums(jnp.zeros((NUM_VECTORS, WIDTH)), jnp.asarray(IDS.ravel()), jnp.asarray(gradient))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("sums", [_sums_by_scatter, _sums_by_products])
def test_they_are_not_added_up_in_bfloat16(sums):
    """Where a sum of ones stops at 256."""
    ones = jnp.ones((2048, WIDTH), jnp.bfloat16)
    found = sums(jnp.zeros((NUM_VECTORS, WIDTH), jnp.bfloat16), jnp.full(2048, 5), ones)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[5], 2048)


def test_an_id_without_a_vector_is_not_a_number():
    embed = Embed(NUM_VECTORS, WIDTH, rngs=nnx.Rngs(0))
    assert np.isnan(embed(jnp.array([NUM_VECTORS]))).all()


def test_the_gradient_of_a_table_sorts_nothing_on_a_gpu():
    """A scatter with sums in a fixed order sorts each value of its updates: 67 million for 8 rows of 7B."""
    missing = targets.no_gpu_compiler("h100")
    if missing is not None:
        pytest.skip(missing)
    place = SingleDeviceSharding(targets.gpus("h100", 1)[0])
    table = jax.ShapeDtypeStruct((32000, 512), jnp.bfloat16, sharding=place)
    ids = jax.ShapeDtypeStruct((2048,), jnp.int32, sharding=place)

    def loss(table: jax.Array, ids: jax.Array) -> jax.Array:
        embed = Embed(32000, 512, rngs=nnx.Rngs(0))
        embed.embedding = nnx.Param(table)
        return (embed(ids).astype(jnp.float32) ** 2).sum()

    text = targets.compile_absent(jax.jit(jax.grad(loss)), table, ids).as_text()
    assert " sort(" not in text
