"""Quantized linear layers: codes and scales against bitsandbytes', products and gradients against whole weights."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import targets
from llava_jax.convert.arrays import place_all
from llava_jax.errors import CheckpointError
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.lora import LoraConfig, is_adapter
from llava_jax.models.parameters import bind, stack_layers
from llava_jax.models.quantized import (
    ABSMAX,
    BLOCK,
    CODES,
    FEW_TOKENS,
    NF4,
    Scheme,
    dequantize,
    is_quantized,
    kernel_shape,
    multiply,
    quantize,
)
from tests.tiny import LLAVA as TINY

LLAVA = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, num_layers=1),
    # Blocks that are whole (64), cut short (48) and both (80).
    text=dataclasses.replace(TINY.text, num_layers=2, embed_dim=64, hidden_dim=80, num_heads=6, num_kv_heads=3),
)
LORA = LoraConfig(rank=4, alpha=8.0)
TOKENS = np.random.default_rng(0).integers(0, LLAVA.text.vocab_size, (2, 11))
GOLDEN = Path(__file__).parents[1] / "golden" / "quantized.json"
# Of a 7B decoder's wide kernels.
SHAPE = (4096, 11008)
HERE = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


@functools.cache
def plain() -> dict[str, np.ndarray]:
    return random_parameters(LLAVA, ("tower", "projector", "decoder"), seed=0)


def held(scheme) -> dict[str, jax.Array]:
    targets = structure(LLAVA, quantize=scheme)[1]
    return place_all(plain(), {n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=HERE) for n, v in targets.items()})


def made_whole(values: dict[str, jax.Array]) -> dict[str, jax.Array]:
    whole = {name: value for name, value in values.items() if not is_quantized(name)}
    for name, codes in values.items():
        if name.endswith(CODES):
            stem = name.removesuffix(CODES)
            whole[f"{stem}.kernel"] = dequantize(codes, values[stem + ABSMAX], jnp.float32)
    return whole


def adapters() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    shapes = {n: v.shape for n, v in structure(LLAVA, lora=LORA)[1].items() if is_adapter(n)}
    return {name: jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnames=("stacked", "quantize", "lora"))
def logits(values, *, stacked: bool = False, quantize=None, lora: LoraConfig | None = None):
    graphdef, _ = structure(LLAVA, stacked=stacked, quantize=quantize, lora=lora)
    model = bind(graphdef, stack_layers(values) if stacked else values)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    return model.decoder(model.decoder.embed_tokens(jnp.asarray(TOKENS)), positions) @ model.decoder.head()


@functools.cache
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def test_nf4_codes_and_scales_are_those_of_bitsandbytes():
    kernel = np.array(golden()["kernel"], np.float32)
    codes, absmax = quantize(jnp.asarray(kernel), "nf4")
    np.testing.assert_array_equal(codes.T, golden()["nf4_codes"])
    np.testing.assert_array_equal(absmax.T, np.array(golden()["nf4_absmax"], np.float32))
    np.testing.assert_array_equal(
        dequantize(codes, absmax, jnp.float32).T, np.array(golden()["nf4_dequantized"], np.float32)
    )


def test_int8_codes_and_scales_are_those_of_bitsandbytes():
    kernel = np.array(golden()["kernel"], np.float32)
    codes, absmax = quantize(jnp.asarray(kernel), "int8")
    np.testing.assert_array_equal(codes.T, golden()["int8_codes"])
    np.testing.assert_array_equal(absmax[0], np.array(golden()["int8_absmax"], np.float32))


def test_every_level_and_every_int8_code_comes_back_as_it_was():
    levels = np.tile(np.array(NF4, np.float32), 2 * BLOCK // len(NF4))[:, None] * np.float32([0.5, 4.0])
    codes, absmax = quantize(jnp.asarray(levels), "nf4")
    np.testing.assert_array_equal(dequantize(codes, absmax, jnp.float32), levels)
    steps = np.arange(-127, 128, dtype=np.float32)[:, None] * np.float32([1.0, 0.25])
    codes, absmax = quantize(jnp.asarray(steps), "int8")
    np.testing.assert_array_equal(codes, np.broadcast_to(np.arange(-127, 128)[:, None], (255, 2)))
    np.testing.assert_allclose(dequantize(codes, absmax, jnp.float32), steps, rtol=2e-7)


@pytest.mark.parametrize(("scheme", "half_step"), [("int8", 0.5 / 127), ("nf4", (NF4[1] - NF4[0]) / 2)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_no_weight_is_further_than_half_a_step_of_its_own_scale(scheme, half_step: float, dtype):
    kernel = jnp.asarray(np.random.default_rng(2).standard_normal((112, 48)) * np.geomspace(1e-4, 10, 48), dtype)
    codes, absmax = quantize(kernel, scheme)
    assert kernel_shape(codes) == kernel.shape
    wide = np.repeat(absmax, 112 if scheme == "int8" else BLOCK, axis=0)[:112]
    off = np.abs(np.asarray(dequantize(codes, absmax, jnp.float32)) - np.asarray(kernel, np.float32)) / wide
    assert 0.5 * half_step < off.max() <= half_step * (1 + 1e-5)


def test_a_block_of_zeros_stays_zero():
    for scheme in ("int8", "nf4"):
        assert not dequantize(*quantize(jnp.zeros((64, 2)), scheme), jnp.float32).any()


def test_weights_that_are_not_finite_are_refused_by_name():
    name = "decoder.layers.1.mlp.up_proj.kernel"
    values = plain() | {name: np.where(np.eye(64, 80) > 0, np.nan, plain()[name])}
    targets = structure(LLAVA, quantize="nf4")[1]
    placed = {n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=HERE) for n, v in targets.items()}
    with pytest.raises(CheckpointError, match=name):
        place_all(values, placed)


def test_an_odd_layer_is_refused_in_nf4():
    odd = dataclasses.replace(LLAVA, text=dataclasses.replace(LLAVA.text, hidden_dim=81))
    structure(odd, quantize="int8")
    with pytest.raises(ValueError, match="two inputs in a byte; got a layer of 81"):
        structure(odd, quantize="nf4")


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_only_the_linear_layers_of_the_decoders_layers_are_quantized(scheme):
    names = set(structure(LLAVA, quantize=scheme)[1])
    whole = set(structure(LLAVA)[1])
    gone = {name.removesuffix(".kernel") for name in whole - names}
    assert gone == {n.removesuffix(".kernel") for n in whole if n.startswith("decoder.layers") and "_proj" in n}
    assert names - whole == {stem + end for stem in gone for end in (CODES, ABSMAX)}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_logits_are_those_of_the_dequantized_weights(scheme, stacked: bool):
    values = held(scheme)
    expected = logits(made_whole(values))
    np.testing.assert_allclose(logits(values, stacked=stacked, quantize=scheme), expected, atol=1e-5)


@pytest.mark.parametrize(("scheme", "most", "mean"), [("int8", 0.2, 0.03), ("nf4", 2.5, 0.35)])
def test_logits_stay_near_those_of_the_whole_model(scheme, most: float, mean: float):
    off = np.abs(logits(held(scheme), quantize=scheme) - logits({n: jnp.asarray(v) for n, v in plain().items()}))
    assert off.max() < most
    assert off.mean() < mean


@pytest.mark.parametrize(
    ("scheme", "stacked"),
    [
        ("int8", False),
        ("nf4", True),
        pytest.param("int8", True, marks=pytest.mark.nightly),
        pytest.param("nf4", False, marks=pytest.mark.nightly),
    ],
)
def test_gradients_of_adapters_are_those_on_the_dequantized_weights(scheme, stacked: bool):
    values = held(scheme)
    weights = np.random.default_rng(3).standard_normal((*TOKENS.shape, LLAVA.text.vocab_size)).astype(np.float32)

    def gradients(frozen, **structured):
        return jax.grad(lambda a: (logits(frozen | a, stacked=stacked, lora=LORA, **structured) * weights).sum())(
            adapters()
        )

    expected = gradients(made_whole(values))
    for name, gradient in gradients(values, quantize=scheme).items():
        scale = np.abs(expected[name]).max()
        assert scale > 0
        assert np.abs(gradient - expected[name]).max() < 1e-5 * scale, name


@pytest.mark.parametrize("tokens", [3, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_product_in_bfloat16_sums_in_float32_and_rounds_once(scheme, tokens: int):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, tokens, 112)), jnp.bfloat16)
    codes, absmax = quantize(jnp.asarray(rng.standard_normal((112, 24)), jnp.float32), scheme)
    product, back = jax.vjp(lambda x: multiply(x, codes, absmax), x)
    # The product of few tokens with int8's codes is scaled when it is summed, so its kernel is not rounded.
    is_exact = scheme == "int8" and tokens <= FEW_TOKENS
    kernel = np.asarray(dequantize(codes, absmax, jnp.float32 if is_exact else jnp.bfloat16), np.float64)
    assert product.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(product, np.float64), np.asarray(x, np.float64) @ kernel, rtol=2**-8, atol=1e-4
    )
    (gradient,) = back(product)
    assert gradient.dtype == jnp.bfloat16
    kernel = np.asarray(dequantize(codes, absmax, jnp.bfloat16), np.float64)
    expected = np.asarray(product, np.float64) @ kernel.T
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.nightly
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_product_of_decoding_on_a_tpu_writes_no_kernel(scheme, tpu: Any):
    """Compiled for v5e at the width of a 7B decoder: memory beside codes, scales and results is no kernel's size."""
    assert _workspace(scheme, tpu) < 0.1 * SHAPE[0] * SHAPE[1]


@pytest.mark.nightly
def test_a_product_of_decoding_on_a_gpu_writes_no_kernel():
    """int8 alone, by Triton's product: an nf4 kernel is written out, half by half, at every token."""
    reason = targets.no_gpu_compiler("h200")
    if reason is not None:
        pytest.skip(reason)
    assert _workspace("int8", targets.gpus("h200", 1)[0]) < 0.1 * SHAPE[0] * SHAPE[1]


def _workspace(scheme: Scheme, device: Any) -> int:
    """Bytes that a product of 8 tokens takes beside operands and result, by the device's compiler."""
    here = jax.sharding.SingleDeviceSharding(device)
    held = jax.eval_shape(functools.partial(quantize, scheme=scheme), jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    operands = [jax.ShapeDtypeStruct((8, 1, SHAPE[0]), jnp.bfloat16), *held]
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in operands]
    return jax.jit(multiply).lower(*placed).compile().memory_analysis().temp_size_in_bytes
