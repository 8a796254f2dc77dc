"""The TPU's attention, interpreted on a CPU: it sees what plain attention sees, and nothing else."""

import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.attention import Attend, Scope, attend_xla
from llava_jax.train.sharding import MeshConfig, make_mesh
from llava_jax.train.splash import make_splash
from llava_jax.train.step import make_attend
from tests.train.runs import ROOT

T = 128
# Three records and padding; the second record begins at slot 50.
SEGMENTS = np.repeat([1, 2, 3, 0], [50, 40, 20, 18])[None].astype(np.int32)
POSITIONS = np.concatenate([np.arange(n) for n in (50, 40, 20)] + [np.zeros(18)])[None].astype(np.int32)


def _scope(window: int | None = None) -> Scope:
    segments, positions = jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)
    return Scope(segments, segments, positions, positions, causal=True, window=window)


def _inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((1, T, n, 128), np.float32)) for n in (2, 1, 1))


@pytest.fixture(scope="module")
def splash() -> Attend:
    return make_splash(make_mesh(MeshConfig()), interpret=True)


def test_splash_is_plain_attention_with_its_gradient(splash: Attend):
    q, k, v = _inputs()
    scope, used = _scope(), (SEGMENTS > 0)[..., None, None]

    def total(attend: Attend, q, k, v):
        mixed = jnp.where(used, attend(q, k, v, scope), 0.0)
        return (mixed**2).sum(), mixed

    run = jax.jit(jax.grad(total, (1, 2, 3), has_aux=True), static_argnums=0)
    for found, expected in zip(
        *(jax.tree.leaves(run(attend, q, k, v)) for attend in (splash, attend_xla)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_window_reaches_as_far_as_in_plain_attention(splash: Attend):
    q, k, v = _inputs()
    used = (SEGMENTS > 0)[..., None, None]
    found, expected = (np.where(used, attend(q, k, v, _scope(7)), 0) for attend in (splash, attend_xla))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_derivative_crosses_a_segment(splash: Attend):
    """d(outputs of segment 2) / d(inputs of segments 1 and 3) is exactly zero, and not so within segment 2."""
    q, k, v = _inputs()
    second = (SEGMENTS == 2)[..., None, None]

    def outputs(q, k, v):
        return jnp.where(second, splash(q, k, v, _scope()), 0.0).sum()

    for gradient in jax.jit(jax.grad(outputs, (0, 1, 2)))(q, k, v):
        assert not np.where(second, 0.0, gradient).any()
        assert np.where(second, gradient, 0.0).any()


def test_other_calls_go_to_plain_attention(splash: Attend):
    q, k, v = _inputs()
    np.testing.assert_array_equal(splash(q, k, v, Scope()), attend_xla(q, k, v, Scope()))
    assert make_attend(make_mesh(MeshConfig()), most_records=3) is attend_xla


SCRIPT = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from llava_jax.compiler import products_in
from llava_jax.models.attention import Scope
from llava_jax.train.sharding import MeshConfig, batch_sharding, make_mesh
from llava_jax.train.step import make_attend

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = make_mesh(MeshConfig(tensor=2), devices)
attend, rows = make_attend(mesh, most_records=3), batch_sharding(mesh)
q, k = (jax.ShapeDtypeStruct((2, 2048, n, 128), sys.argv[1], sharding=rows) for n in (8, 2))
ids = jax.ShapeDtypeStruct((2, 2048), jnp.int32, sharding=rows)
loss = lambda q, k, v, ids: attend(q, k, v, Scope(ids, ids, ids, ids, causal=True)).astype(jnp.float32).sum()
gradient = products_in(sys.argv[1])(jax.grad(loss, (0, 1, 2)))
text = jax.jit(gradient).lower(q, k, k, ids).compile().as_text()
print(text.count("tpu_custom_call"), "2048,2048]" in text)
"""


@pytest.mark.nightly
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install libtpu")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_compiles_for_a_tpu_at_the_size_of_training(dtype: str):
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    settings |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtype],
        cwd=ROOT,
        env=os.environ | settings | {"PYTHONPATH": str(ROOT), "TPU_ACCELERATOR_TYPE": "v5litepod-8"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels, has_scores = result.stdout.split()
    assert int(kernels) >= 3
    assert has_scores == "False"
