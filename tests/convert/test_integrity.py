"""Fingerprints see every flipped bit and no sharding, and name what differs."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.convert.integrity import Damaged, array_sums, compare, fingerprints

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool"]


def _array(dtype: str, shape: tuple[int, ...] = (5, 3, 7), seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape) * 100
    return (values > 0) if dtype == "bool" else np.asarray(jnp.asarray(values.astype(np.int32)).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_the_sum(dtype: str):
    array = _array(dtype, (3, 4))
    before = np.asarray(array_sums(jnp.asarray(array)))
    bits = [0] if dtype == "bool" else range(8 * array.dtype.itemsize)
    for place in range(array.size):
        for bit in bits:
            damaged = bytearray(array.tobytes())
            damaged[place * array.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            after = np.asarray(array_sums(jnp.asarray(np.frombuffer(bytes(damaged), array.dtype).reshape(array.shape))))
            assert (before != after).all()


def test_exchanged_values_and_axes_change_the_sum():
    array = _array("float32", (6, 6))
    before = fingerprints({"x": jnp.asarray(array)})
    swapped = array.copy()
    swapped[1], swapped[4] = array[4], array[1]
    for other in (swapped, array.T, array[::-1], np.roll(array, 1), array + np.float32(1e-5)):
        assert fingerprints({"x": jnp.asarray(other)}) != before


def test_the_sum_is_what_numpy_says():
    """The value is a promise: checkpoints of today must be read by the code of tomorrow."""
    array = _array("float32", (2, 3, 5))
    axes = [0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D]
    place = sum(index * axis for index, axis in zip(np.indices(array.shape).astype(np.uint64), axes, strict=True))
    expected = []
    for lane in (0, 0x5BD1E995):
        x = (place & 0xFFFFFFFF) ^ lane
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        weight = (x ^ (x >> 16)) | 1
        expected.append(int((array.view(np.uint32).astype(np.uint64) * weight & 0xFFFFFFFF).sum() & 0xFFFFFFFF))
    np.testing.assert_array_equal(array_sums(jnp.asarray(array)), np.array(expected, np.uint32))


def test_what_differs_is_named():
    compare({"a": "1", "b": "2"}, {"a": "1", "b": "2"}, "step 3")
    with pytest.raises(Damaged, match="step 3 is damaged: b differ"):
        compare({"a": "1", "b": "2"}, {"a": "1", "b": "3"}, "step 3")
    with pytest.raises(Damaged, match="c are in one alone"):
        compare({"a": "1"}, {"a": "1", "c": "3"}, "step 3")


SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from llava_jax.convert.integrity import fingerprints
x = np.random.default_rng(0).standard_normal((8, 16, 4)).astype(np.float32)
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
specs = [P(), P("a"), P("b"), P(None, "b"), P("a", "b"), P(("a", "b")), P("b", None, "a")]
print({fingerprints({"x": jax.device_put(x, NamedSharding(mesh, spec))})["x"] for spec in specs})
"""


def test_any_sharding_gives_the_same_sum():
    x = np.random.default_rng(0).standard_normal((8, 16, 4)).astype(np.float32)
    result = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == str({fingerprints({"x": jnp.asarray(x)})["x"]})
