"""cuDNN's attention: what it is told of a packed row, on any machine; that it sees nothing else, where there is one."""

import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from llava_jax import targets
from llava_jax.models.attention import Scope, attend_xla
from llava_jax.train import cudnn
from llava_jax.train.cudnn import find_runs, make_cudnn, why_not
from llava_jax.train.sharding import MeshConfig, batch_sharding, make_mesh
from llava_jax.train.step import REMAT, make_attend

fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
T = 32
# Three records and padding; a record of one token; a row that is all padding.
SEGMENTS = np.stack(
    [np.repeat([1, 2, 3, 0], [10, 12, 6, 4]), np.repeat([1, 2, 0], [1, 31, 0]), np.zeros(T, int)]
).astype(np.int32)
HAS_KERNEL = jax.default_backend() == "gpu" and why_not() is None


def _scope(**changed: object) -> Scope:
    segments = jnp.asarray(SEGMENTS)
    slots = jnp.broadcast_to(jnp.arange(T), segments.shape)
    return Scope(segments, segments, slots, slots, causal=True)._replace(**changed)


def _inputs(dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((len(SEGMENTS), T, n, 16)), dtype) for n in (4, 2, 2))
    return q, k, v


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernel's place plain attention over what its documentation says of lengths and offsets."""

    def attend(q, k, v, *, scale, mask_type, q_seqlen=None, kv_seqlen=None, q_offsets=None, kv_offsets=None):
        assert scale == pytest.approx(q.shape[-1] ** -0.5)
        if mask_type == fused.MaskType.NO_MASK:
            return attend_xla(q, k, v, Scope())
        if mask_type == fused.MaskType.PADDING:
            t, s = int(q_seqlen[0]), int(kv_seqlen[0])
            assert (np.asarray(q_seqlen) == t).all()
            assert (np.asarray(kv_seqlen) == s).all()
            seen = attend_xla(q[:, :t], k[:, :s], v[:, :s], Scope())
            return jnp.pad(seen, [(0, 0), (0, q.shape[1] - t), (0, 0), (0, 0)], constant_values=jnp.nan)
        assert mask_type == fused.MaskType.PADDING_CAUSAL
        np.testing.assert_array_equal(q_seqlen, kv_seqlen)
        np.testing.assert_array_equal(q_offsets, kv_offsets)
        assert q_seqlen is not None
        assert q_offsets is not None
        assert q_offsets.shape[1] == q_seqlen.shape[1] + 1
        # What no sequence covers is left unwritten.
        mixed = np.full(q.shape, np.nan, q.dtype)
        for row, (lengths, starts) in enumerate(zip(np.asarray(q_seqlen), np.asarray(q_offsets), strict=True)):
            for length, start in zip(lengths[lengths >= 0], starts[starts >= 0], strict=True):
                own = slice(start, start + length)
                slots = jnp.arange(length)[None]
                scope = Scope(query_positions=slots, key_positions=slots, causal=True)
                mixed[row, own] = attend_xla(
                    q[row : row + 1, own], k[row : row + 1, own], v[row : row + 1, own], scope
                )[0]
        return jnp.asarray(mixed)

    def on_host(q, k, v, **settings):
        named = {name: settings.pop(name) for name in list(settings) if not isinstance(settings[name], jax.Array)}
        plain = functools.partial(attend, **named)
        out = jax.ShapeDtypeStruct(q.shape, q.dtype)
        names = list(settings)

        def call(q, k, v, *arrays):
            return plain(*map(jnp.asarray, (q, k, v)), **dict(zip(names, map(jnp.asarray, arrays), strict=True)))

        return jax.pure_callback(call, out, q, k, v, *settings.values())

    monkeypatch.setattr(fused, "dot_product_attention", on_host)


def test_runs_of_a_packed_row():
    lengths, starts = find_runs(jnp.array([[1, 1, 1, 2, 0, 0], [1, 2, 3, 4, 4, 4]], jnp.int32), 4)
    np.testing.assert_array_equal(lengths, [[3, 1, 2, -1], [1, 1, 1, 3]])
    np.testing.assert_array_equal(starts, [[0, 3, 4, -1, -1], [0, 1, 2, 3, -1]])


def test_every_slot_belongs_to_a_run():
    lengths, starts = map(np.asarray, find_runs(jnp.asarray(SEGMENTS), 4))
    assert (np.where(lengths > 0, lengths, 0).sum(axis=1) == T).all()
    assert ((starts[:, :-1] >= 0) == (lengths > 0)).all()


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("scope", [_scope(), Scope()], ids=["packed", "sees all"])
def test_the_kernel_is_asked_for_what_plain_attention_does(mesh: Mesh, scope: Scope):
    q, k, v = _inputs()
    found = make_cudnn(mesh, most_records=3)(q, k, v, scope)
    expected = attend_xla(q, k, v, scope)
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=0.02)


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize(("t", "s"), [(31, 31), (31, 32), (32, 31)])
def test_odd_lengths_see_all_and_no_more(mesh: Mesh, t: int, s: int):
    q, k, v = _inputs()
    found = make_cudnn(mesh, most_records=3)(q[:, :t], k[:, :s], v[:, :s], Scope())
    np.testing.assert_allclose(
        np.float32(found), np.float32(attend_xla(q[:, :t], k[:, :s], v[:, :s], Scope())), atol=0.02
    )


def test_a_slot_that_is_not_seen_has_no_gradient(monkeypatch: pytest.MonkeyPatch):
    """What the kernel leaves unwritten, in its results and in its gradients, reaches nothing."""

    @jax.custom_vjp
    def kernel(q, k, v):
        return spoilt(attend_xla(q[:, :31], k[:, :31], v[:, :31], Scope()))

    def spoilt(x):
        return jnp.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)], constant_values=jnp.nan)

    def forward(q, k, v):
        return kernel(q, k, v), (q, k, v)

    def backward(saved, gradient):
        inner = (x[:, :31] for x in saved)
        _, back = jax.vjp(lambda q, k, v: attend_xla(q, k, v, Scope()), *inner)
        return tuple(map(spoilt, back(gradient[:, :31])))

    kernel.defvjp(forward, backward)
    monkeypatch.setattr(cudnn, "_call", lambda q, k, v, **_: kernel(q, k, v))
    inputs = [x[:, :31] for x in _inputs("float32")]

    def gradients(attend):
        return jax.grad(lambda q, k, v: (attend(q, k, v) ** 2).sum(), (0, 1, 2))(*inputs)

    plain = gradients(lambda q, k, v: attend_xla(q, k, v, Scope()))
    for found, expected in zip(gradients(cudnn._attend_all), plain, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_may_be_given_to_the_kernel_a_few_at_a_time(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, rows: int):
    q, k, v = _inputs()
    monkeypatch.setattr(cudnn, "WORKSPACE", rows * 4 * T * 4 * 16 * 4)
    found = make_cudnn(mesh, most_records=3)(q, k, v, _scope())
    np.testing.assert_allclose(np.float32(found), np.float32(attend_xla(q, k, v, _scope())), atol=0.02)


@pytest.mark.parametrize("changed", [{"window": 5}, {"key_segments": None, "query_segments": None}], ids=str)
def test_other_calls_go_to_plain_attention(mesh: Mesh, changed: dict[str, object]):
    scope = _scope(**changed)
    found, expected = (attend(*_inputs(), scope) for attend in (make_cudnn(mesh, most_records=3), attend_xla))
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))


def test_float32_goes_to_plain_attention(mesh: Mesh):
    inputs = _inputs("float32")
    found = make_cudnn(mesh, most_records=3)(*inputs, _scope())
    np.testing.assert_array_equal(found, attend_xla(*inputs, _scope()))


@pytest.fixture
def lowered_only() -> Iterator[None]:
    with cudnn.for_absent_gpus():
        yield


@pytest.mark.usefixtures("lowered_only")
@pytest.mark.parametrize("remat", ["nothing", "elementwise", "linear"])
def test_a_gradient_calls_the_kernel_once_each_way(mesh: Mesh, remat: str):
    """Also under recomputation: the kernel's own results are kept, so that it does not run again."""
    attend = make_cudnn(mesh, most_records=3)

    def layer(q, k, v):
        return attend(q * 2, k, v, _scope()) + 1

    def loss(q, k, v):
        wrap = REMAT[remat]
        return (wrap(layer) if wrap else layer)(q, k, v).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = gradient.trace(*_inputs()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == 1
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert "PADDING_CAUSAL" in text
    # Three records and the padding behind them, in each of three rows; four heads of queries, and of keys.
    assert "tensor<3x32x4x16xbf16>, tensor<3x32x4x16xbf16>, tensor<3x32x4x16xbf16>" in text
    assert "\\22max_seg_per_batch\\22: 4" in text


@pytest.mark.usefixtures("lowered_only")
def test_what_a_run_tries_can_be_lowered(monkeypatch: pytest.MonkeyPatch):
    """The trial's own calls, a tower's odd number of patches with its gradient among them: JAX refuses some forms."""
    texts = []

    def lower(run, scope, *, t, heads, h):
        q, k, v = (jnp.zeros((2, t, n, h), jnp.bfloat16) for n in (heads[0], heads[1], heads[1]))
        gradient = jax.jit(jax.grad(lambda q, k, v: run(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)))
        texts.append(gradient.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text())
        return 0.0

    monkeypatch.setattr(cudnn, "_difference", lower)
    assert cudnn._largest_error() == 0.0
    assert len(texts) == 2
    assert all("@__cudnn$fmhaSoftmaxBackward(" in text for text in texts)


@pytest.mark.usefixtures("lowered_only")
def test_the_backward_pass_of_a_call_is_bounded(mesh: Mesh, monkeypatch: pytest.MonkeyPatch):
    """Its workspace is a float32 row of queries for each run that there may be."""
    monkeypatch.setattr(cudnn, "WORKSPACE", 2 * 4 * T * 4 * 16 * 4)
    attend = make_cudnn(mesh, most_records=3)
    gradient = jax.jit(jax.grad(lambda q, k, v: attend(q, k, v, _scope()).astype(jnp.float32).sum(), (0, 1, 2)))
    text = gradient.trace(*_inputs()).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 2
    assert "tensor<2x32x4x16xbf16>" in text
    assert "tensor<1x32x4x16xbf16>" in text


@pytest.mark.nightly
@pytest.mark.parametrize("most_records", [4, 40])
def test_cudnn_takes_the_workspace_that_is_reckoned_with(most_records: int):
    """Asked by the real cuDNN, without a GPU: no call takes much more than `WORKSPACE`, or than one row needs."""
    reason = targets.no_gpu_compiler("h200")
    if reason is not None:
        pytest.skip(reason)
    mesh = make_mesh(MeshConfig(), targets.gpus("h200", 1))
    attend = make_attend(mesh, most_records=most_records)

    def total(q, k, v, ids):
        slots = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return attend(q, k, v, Scope(ids, ids, slots, slots, causal=True)).astype(jnp.float32).sum()

    q = jax.ShapeDtypeStruct((8, 2048, 32, 128), jnp.bfloat16, sharding=batch_sharding(mesh))
    ids = jax.ShapeDtypeStruct((8, 2048), jnp.int32, sharding=batch_sharding(mesh))
    text = targets.compile_absent(jax.jit(jax.grad(total, (0, 1, 2))), q, q, q, ids).as_text()
    backward = [int(size) for size in re.findall(r"bf16\S+ bf16\S+ bf16\S+ u8\[(\d+)\]\S* custom-call", text)]
    assert backward
    # Deterministic operations: once more for each 256 slots; and what is left of the softmax, a number a slot.
    most = max(cudnn.WORKSPACE, (most_records + 1) * 2048 * 32 * 128 * 4)
    assert max(backward) < 1.01 * most * 2048 / 256


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None = None, **_: object) -> jax.Array:
    slots = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return attend_xla(q, k, v, Scope() if ids is None else Scope(ids, ids, slots, slots, causal=True))


def _leaking(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, **_: object) -> jax.Array:
    return _plain(q, k, v, jnp.zeros_like(ids))


def _unwritten(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, **_: object) -> jax.Array:
    return jnp.where((ids > 0)[..., None, None], _plain(q, k, v, ids), jnp.nan)


def _absent(*_: object, **__: object) -> jax.Array:
    raise RuntimeError("cuDNN is not detected.")


@pytest.mark.parametrize(
    ("packed", "tower", "reason"),
    [
        (_plain, _plain, None),
        (_leaking, _plain, "differs"),
        (_unwritten, _plain, "plain attention by inf"),
        (_absent, _plain, "cuDNN is not detected"),
        (_plain, _absent, "cuDNN is not detected"),
        (_plain, lambda q, k, v: _plain(q, k, 2 * v), "differs"),
    ],
)
def test_a_kernel_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch, packed, tower, reason: str | None):
    """One that lets records see each other, one that leaves slots unwritten, one that does not start."""
    monkeypatch.setattr(type(jax.local_devices()[0]), "compute_capability", "9.0", raising=False)
    monkeypatch.setattr(cudnn, "_attend_packed", packed)
    monkeypatch.setattr(cudnn, "_attend_all", tower)
    found = why_not()
    assert found is None if reason is None else reason in str(found)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU may have the kernel")
def test_a_machine_without_such_a_gpu_says_so():
    assert "no NVIDIA GPU from Hopper on" in str(why_not())


@pytest.mark.skipif(not HAS_KERNEL, reason="needs a Hopper GPU and cuDNN")
def test_no_derivative_crosses_a_segment():
    """d(outputs of segment 2) / d(inputs of segments 1 and 3) is exactly zero, and not so within segment 2."""
    q, k, v = _inputs()
    second = jnp.asarray(SEGMENTS == 2)[..., None, None]
    attend = make_attend(make_mesh(MeshConfig()), most_records=3)
    assert attend is not attend_xla

    def outputs(q, k, v):
        return jnp.where(second, attend(q, k, v, _scope()), 0.0).astype(jnp.float32).sum()

    for gradient in jax.jit(jax.grad(outputs, (0, 1, 2)))(q, k, v):
        assert not np.where(second, 0.0, gradient).any()
        assert np.where(second, gradient, 0.0).any()
