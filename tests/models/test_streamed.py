"""Streamed products against plain ones, and what is compiled of them."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.compiler import compiler_options
from llava_jax.convert.arrays import place_all
from llava_jax.convert.tensor import in_memory
from llava_jax.inference import generate as module
from llava_jax.inference.generate import logits_of
from llava_jax.inference.model import Model, hold
from llava_jax.models.attention import attend_xla
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.layers import Linear
from llava_jax.models.llama import empty_cache
from llava_jax.models.parameters import bind
from llava_jax.models.quantized import QuantizedLinear, dequantize, quantize
from llava_jax.models.streamed import MOST_STREAMED, StreamedLinear, StreamedQuantizedLinear, attend_streamed, multiply
from tests.tiny import LLAVA

TIED = dataclasses.replace(LLAVA, text=dataclasses.replace(LLAVA.text, tie_embeddings=True))


@functools.cache
def values(config: Any = LLAVA) -> dict[str, np.ndarray]:
    return random_parameters(config, ("tower", "projector", "decoder"), seed=0)


@pytest.mark.parametrize("outputs", [1, 4, 7, 18])
@pytest.mark.parametrize("axes", [(1,), (MOST_STREAMED,), (MOST_STREAMED + 1,), (2, 3), (5, 7)])
def test_a_streamed_product_is_a_product(axes: tuple[int, ...], outputs: int):
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((*axes, 37), (outputs, 37)))
    options = compiler_options(jax.devices()[0], in_any_order=True)
    found = jax.jit(multiply, compiler_options=options)(x, weight)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, x.astype(np.float64) @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [MOST_STREAMED, MOST_STREAMED + 1])
def test_bfloat16_is_added_up_in_float32(tokens: int):
    ones = jnp.ones((tokens, 1000), jnp.bfloat16)
    found = jax.jit(multiply)(ones, jnp.full((5, 1000), 1.0078125, jnp.bfloat16))
    np.testing.assert_array_equal(found, np.full((tokens, 5), 1007.8125, np.float32))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_infinities_and_nan_stay_what_they_are(special: float):
    x = jnp.ones((2, 40)).at[1, 7].set(special)
    options = compiler_options(jax.devices()[0], in_any_order=True)
    found = np.asarray(jax.jit(multiply, compiler_options=options)(x, jnp.ones((6, 40))))
    np.testing.assert_array_equal(found, np.stack([np.full(6, 40.0), np.full(6, special)]).astype(np.float32))


# Whole blocks of nf4.
WIDE = dataclasses.replace(LLAVA, text=dataclasses.replace(LLAVA.text, embed_dim=64, hidden_dim=128))


@pytest.mark.parametrize("config", [LLAVA, TIED, WIDE], ids=["with a head", "tied", "wide"])
@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
def test_a_streamed_model_is_the_plain_one(config: Any, scheme: Any):
    streamed = hold(config, values(config), quantize=scheme)
    graphdef, shapes = structure(config, quantize=scheme)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for name, v in shapes.items()}
    plain = Model(config=config, graphdef=graphdef, params=place_all(values(config), targets))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.text.vocab_size, (2, 11)))

    # Eight tokens of a prompt in each row, then one at a time.
    def logits(model: Model) -> np.ndarray:
        def run(params: Any) -> jax.Array:
            llava = bind(model.graphdef, params)
            cache, seen = empty_cache(config.text, batch=2, length=11, dtype=jnp.float32), []
            for begin, end in ((0, 8), (8, 9), (9, 10), (10, 11)):
                positions = jnp.broadcast_to(jnp.arange(begin, end), (2, end - begin))
                attend = attend_streamed if llava.decoder.is_streamed else attend_xla
                x = llava.decoder.embed_tokens(tokens[:, begin:end])
                x, cache = llava.decoder.extend(x, positions, cache, attend=attend)
                seen.append(logits_of(llava, x))
            return jnp.concatenate(seen, axis=1)

        return np.asarray(jax.jit(run)(model.params))

    assert streamed.graphdef != plain.graphdef
    np.testing.assert_allclose(logits(streamed), logits(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("axes", [(1, 1), (MOST_STREAMED, 1), (1, MOST_STREAMED + 1)])
def test_streamed_codes_are_multiplied_as_the_kernel_they_stand_for(axes: tuple[int, int], scheme: Any, dtype: Any):
    rng = np.random.default_rng(0)
    kernel, x = (rng.standard_normal(shape, np.float32) for shape in ((192, 37), (*axes, 192)))
    codes, absmax = quantize(jnp.asarray(kernel), scheme)
    layer = _streamed_codes(scheme, kernel.shape)
    layer.turned_codes[...], layer.turned_absmax[...] = codes.T, absmax.T
    options = compiler_options(jax.devices()[0], in_any_order=True)
    x = jnp.asarray(x, dtype)
    found = jax.jit(layer, compiler_options=options)(x)
    assert found.dtype == dtype
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(codes, absmax, jnp.float32))
    off = np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()
    assert off < (1e-6 if dtype == jnp.float32 else 4e-3)


@pytest.mark.parametrize("tokens", [MOST_STREAMED, MOST_STREAMED + 1])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_streamed_products_write_no_kernels(scheme: Any, tokens: int):
    """Of four layers in a loop over tokens: none for few tokens, one at a time for many, and none before the loop."""
    graphdef, state = nnx.split(nnx.List([_streamed_codes(scheme, (1024, 1024)) for _ in range(4)]))

    def run(state: Any, x: jax.Array) -> jax.Array:
        layers = nnx.merge(graphdef, state)
        return jax.lax.fori_loop(0, 3, lambda _, x: functools.reduce(lambda x, layer: layer(x), layers, x), x)

    options = compiler_options(jax.devices()[0], in_any_order=True)
    program = jax.jit(run, compiler_options=options).lower(state, jnp.zeros((tokens, 1024))).compile()
    # In float32 a kernel takes 4 MB.
    most = 300_000 if tokens == MOST_STREAMED else 4_800_000
    assert program.memory_analysis().temp_size_in_bytes < most


@pytest.mark.parametrize(
    ("scheme", "width", "is_streamed"), [("int8", 96, True), ("nf4", 96, False), ("nf4", 128, True)]
)
def test_nf4_is_streamed_in_whole_blocks(scheme: Any, width: int, is_streamed: bool):
    text = dataclasses.replace(LLAVA.text, embed_dim=width, hidden_dim=128)
    config = dataclasses.replace(LLAVA, text=text)
    names = hold(config, random_parameters(config, ("tower", "projector", "decoder"), seed=0), quantize=scheme).params
    ends = (".turned_codes", ".turned_absmax") if is_streamed else (".codes", ".absmax")
    assert {f"decoder.layers.0.mlp.up_proj{end}" for end in ends} <= set(names)


def _streamed_codes(scheme: Any, shape: tuple[int, int]) -> StreamedQuantizedLinear:
    linear = Linear(*shape, use_bias=False, rngs=nnx.Rngs(0))
    return StreamedQuantizedLinear(QuantizedLinear(linear, scheme))


def test_a_file_is_turned_as_it_is_read():
    lazily = {name: in_memory(value, name) for name, value in values().items()}
    read, given = hold(LLAVA, lazily), hold(LLAVA, {name: jnp.asarray(value) for name, value in values().items()})
    turned = {name for name in read.params if name.endswith(".weight")}
    # Seven of a layer, and the head.
    assert len(turned) == 7 * LLAVA.text.num_layers + 1
    for name, value in read.params.items():
        kernel = values()[name.replace(".weight", ".kernel")]
        np.testing.assert_array_equal(value, kernel.T if name in turned else kernel)
        np.testing.assert_array_equal(value, given.params[name])


def test_decoding_turns_and_copies_no_weights():
    """Not at a token and not before: neither a transposition nor a copy of a kernel's size is compiled."""
    model = hold(LLAVA, values())
    text = _compiled_step(model.config, model.graphdef, model.params, jnp.float32).as_text()
    kernels = {tuple(sorted(value.shape)) for name, value in model.params.items() if name.endswith(".weight")}
    written = re.findall(r"= f32\[([0-9]+),([0-9]+)\]\S* (?:copy|transpose)\(", text)
    assert not {tuple(sorted(map(int, shape))) for shape in written} & kernels


@pytest.mark.parametrize(
    ("batch", "most"),
    # In float32 the table takes 8 MB, the kernels of the layers as much, and so does the head. With more rows there is
    # one kernel at a time, at most the head.
    [(2, 1_600_000), (MOST_STREAMED, 1_600_000), (MOST_STREAMED + 1, 11_000_000)],
)
def test_decoding_in_bfloat16_widens_no_weights_that_it_need_not(batch: int, most: int):
    """Neither the table nor a kernel has a copy in float32, which XLA's CPU backend computes in."""
    text = dataclasses.replace(LLAVA.text, vocab_size=8192, embed_dim=256, hidden_dim=512, num_heads=8, num_kv_heads=8)
    config = dataclasses.replace(LLAVA, text=text)
    graphdef, shapes = structure(config, streamed=True)
    params = {name: jax.ShapeDtypeStruct(value.shape, jnp.bfloat16) for name, value in shapes.items()}
    step = _compiled_step(config, graphdef, params, jnp.bfloat16, batch=batch)
    assert step.memory_analysis().temp_size_in_bytes < most
    # Nor is anything added up in bfloat16.
    assert not re.search(r"= \(?bf16.* (reduce|dot)\(", step.as_text())


def test_decoding_streams_all_but_the_values():
    """Of the products of a step XLA's own are one a layer, that of weights and values."""
    model = hold(LLAVA, values())
    text = _compiled_step(model.config, model.graphdef, model.params, jnp.float32).as_text()
    assert len(re.findall(r" dot\(", text)) == LLAVA.text.num_layers
    # Sums, such as those of norms, are no trees of windows.
    assert "reduce-window" not in text


def test_decoding_copies_no_cache():
    """What a step needs beside arguments and results is less than the keys of a layer."""
    model = hold(LLAVA, values())
    length = 8192
    step = _compiled_step(model.config, model.graphdef, model.params, jnp.float32, length=length)
    keys = empty_cache(LLAVA.text, batch=2, length=length, dtype=jnp.float32).layers[0].k
    assert step.memory_analysis().temp_size_in_bytes < keys.nbytes


def _compiled_step(config: Any, graphdef: Any, params: Any, dtype: Any, *, batch: int = 2, length: int = 64) -> Any:
    state = module.State(
        empty_cache(config.text, batch=batch, length=length, dtype=dtype),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.int32(1),
        jnp.zeros(batch, bool),
    )
    choose = module._Choice(jnp.float32(1), jnp.float32(1), jnp.int32(0), jnp.zeros(2, jnp.uint32))
    advance = module._programs(jax.devices()[0]).advance
    return advance.lower(
        params, state, choose, jnp.int32(3), graphdef=graphdef, is_greedy=True, stop_ids=(2,)
    ).compile()


def test_a_streamed_layer_shows_its_kernel():
    plain = bind(*_one(streamed=False)).decoder.layers[0].mlp.up_proj
    streamed = bind(*_one(streamed=True)).decoder.layers[0].mlp.up_proj
    assert isinstance(streamed, StreamedLinear)
    assert streamed.kernel.shape == plain.kernel.shape


def _one(*, streamed: bool) -> Any:
    graphdef, shapes = structure(LLAVA, streamed=streamed)
    return graphdef, {name: jnp.zeros(value.shape, value.dtype) for name, value in shapes.items()}
