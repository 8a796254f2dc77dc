"""Parameters by path: stacked and apart, bound and counted."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from jax.sharding import PartitionSpec

from llava_jax.models.build import initial_value, random_parameters, structure
from llava_jax.models.parameters import Parameters, bind, count, parameters, part, stack_layers, unstack_layers
from llava_jax.shapes import ClipConfig, LlavaConfig, TextConfig
from llava_jax.sizes import CLIP_L_336, LLAVA_15_7B, LLAVA_15_13B, VICUNA_7B, VICUNA_13B
from llava_jax.train.sharding import partition
from tests.models import oracle
from tests.tiny import CAPTION, CLIP, LLAVA

MISTRAL_7B = dataclasses.replace(
    VICUNA_7B, hidden_dim=14_336, num_kv_heads=8, rope_theta=1e6, max_positions=32_768, sliding_window=4096
)


def _llava(text: TextConfig, projector: str = "mlp2x_gelu") -> LlavaConfig:
    return LlavaConfig(
        vision=CLIP_L_336, text=text, projector=projector, select_layer=-2, select_feature="patch", image_newline=False
    )


@functools.cache
def _abstract(text: TextConfig) -> Parameters:
    return structure(_llava(text))[1]


def test_llava_15_has_exactly_its_published_number_of_parameters():
    d, f, layers, v = 4096, 11_008, 32, 32_000
    decoder = 2 * v * d + layers * (4 * d * d + 3 * d * f + 2 * d) + d
    e, m = 1024, 4096
    tower_layer = 4 * (e * e + e) + (e * m + m) + (m * e + e) + 4 * e
    tower = 3 * 14 * 14 * e + e + (1 + 24 * 24) * e + 24 * tower_layer + 2 * 2 * e
    projector = e * d + d + d * d + d
    by_part = {"decoder": decoder, "tower": tower, "projector": projector}
    assert by_part == {"decoder": 6_738_415_616, "tower": 303_507_456, "projector": 20_979_712}
    assert _llava(VICUNA_7B) == LLAVA_15_7B
    assert _llava(VICUNA_13B) == LLAVA_15_13B
    abstract = _abstract(VICUNA_7B)
    for name, expected in by_part.items():
        assert count({n: value for n, value in abstract.items() if part(n) == name}) == expected, name
    assert count(abstract) == 7_062_902_784


@pytest.mark.parametrize("text", [VICUNA_7B, VICUNA_13B, MISTRAL_7B], ids=["vicuna_7b", "vicuna_13b", "mistral_7b"])
def test_real_sizes_have_the_references_parameters(text: TextConfig):
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration(oracle.llava_config(_llava(text)))
    assert count(_abstract(text)) == sum(value.numel() for value in theirs.state_dict().values())


def test_a_tied_head_is_counted_once():
    tied = dataclasses.replace(LLAVA, text=dataclasses.replace(LLAVA.text, tie_embeddings=True))
    saved = LLAVA.text.vocab_size * LLAVA.text.embed_dim
    assert count(structure(LLAVA)[1]) - count(structure(tied)[1]) == saved


@pytest.mark.parametrize(
    ("projector", "shapes"),
    [
        ("identity", {}),
        ("linear", {"0": (24, 32)}),
        ("mlp2x_gelu", {"0": (24, 32), "1": (32, 32)}),
        ("mlp3x_gelu", {"0": (24, 32), "1": (32, 32), "2": (32, 32)}),
    ],
)
def test_a_projector_has_as_many_layers_as_its_name_says(projector: str, shapes: dict[str, tuple[int, int]]):
    vision = dataclasses.replace(LLAVA.vision, embed_dim=32 if projector == "identity" else 24)
    config = dataclasses.replace(LLAVA, vision=vision, projector=projector)
    found = {n: v.shape for n, v in structure(config)[1].items() if part(n) == "projector"}
    kernels = {f"projector.linear.{i}.kernel": shape for i, shape in shapes.items()}
    assert found == kernels | {f"projector.linear.{i}.bias": shape[1:] for i, shape in shapes.items()}


@pytest.mark.parametrize("config", [LLAVA, CLIP], ids=["llava", "clip"])
def test_unstacking_is_the_exact_inverse_of_stacking(config: LlavaConfig | ClipConfig):
    parts = {part(name) for name in structure(config)[1]}
    params = {name: jnp.asarray(value) for name, value in random_parameters(config, parts, seed=0).items()}
    stacked = stack_layers(params)
    assert not any(".layers.0." in name for name in stacked)
    back = unstack_layers(stacked)
    assert set(back) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(back[name], value)
    for name, value in unstack_layers(params).items():
        np.testing.assert_array_equal(params[name], value)


def test_layer_ten_is_stacked_after_layer_nine():
    values = {f"decoder.layers.{i}.norm.scale": jnp.array(i) for i in (10, 2, 0, 1, 9, 3, 4, 5, 6, 7, 8)}
    np.testing.assert_array_equal(stack_layers(values)["decoder.layers.norm.scale"], np.arange(11))


def test_binding_and_listing_are_inverses():
    graphdef, expected = structure(LLAVA)
    params = random_parameters(LLAVA, {"tower", "projector", "decoder"}, seed=3)
    listed = parameters(bind(graphdef, params))
    assert set(listed) == set(expected)
    for name, value in listed.items():
        np.testing.assert_array_equal(value, params[name])


def test_random_values_depend_on_seed_and_path_alone():
    whole = random_parameters(LLAVA, {"tower", "projector", "decoder"}, seed=5)
    alone = random_parameters(LLAVA, {"projector"}, seed=5)
    assert set(alone) == {name for name in whole if part(name) == "projector"}
    for name, value in alone.items():
        np.testing.assert_array_equal(value, whole[name])
    tower = random_parameters(CLIP, {"tower"}, seed=5)
    for name, value in tower.items():
        np.testing.assert_array_equal(value, whole[name])
    other = random_parameters(LLAVA, {"projector"}, seed=6)
    assert not np.array_equal(other["projector.linear.0.kernel"], alone["projector.linear.0.kernel"])
    assert not np.array_equal(
        whole["decoder.layers.0.self_attn.q_proj.kernel"], whole["decoder.layers.1.self_attn.q_proj.kernel"]
    )
    assert all(value.dtype == np.float32 for value in whole.values())


def test_the_abstract_parameters_of_a_stack_have_the_layer_axis():
    stacked = jax.eval_shape(stack_layers, structure(LLAVA)[1])
    assert {n: v.shape for n, v in structure(LLAVA, stacked=True)[1].items()} == {
        n: v.shape for n, v in stacked.items()
    }


def test_34b_takes_no_memory():
    text = dataclasses.replace(
        VICUNA_7B, vocab_size=64_000, num_layers=60, embed_dim=7168, hidden_dim=20_480, num_heads=56, num_kv_heads=8
    )
    abstract = structure(_llava(text), stacked=True)[1]
    assert count(abstract) > 34e9
    assert all(isinstance(value, jax.ShapeDtypeStruct) for value in abstract.values())


def test_shapes_refuse_what_cannot_be_built():
    cases = [
        (lambda: dataclasses.replace(VICUNA_7B, num_kv_heads=5), r"num_kv_heads=5, text\.num_heads=32"),
        (lambda: dataclasses.replace(VICUNA_7B, head_dim=7), r"2 must divide text\.head_dim; got .*=7"),
        (lambda: dataclasses.replace(VICUNA_7B, sliding_window=0), r"sliding_window must be None or at least 1; got 0"),
        (lambda: dataclasses.replace(CLIP_L_336, patch_size=15), r"patch_size=15, vision\.image_size=336"),
        (lambda: dataclasses.replace(CLIP_L_336, num_layers=0), r"num_layers must be at least 1; got 0"),
        (lambda: dataclasses.replace(CAPTION, eos_id=99), r"eos_id=99, vocab_size=99"),
        (lambda: _llava(VICUNA_7B, "mlp2x"), r"linear, mlpNx_gelu or identity; got 'mlp2x'"),
        (lambda: _llava(VICUNA_7B, "mlp0x_gelu"), r"got 'mlp0x_gelu'"),
        (lambda: _llava(VICUNA_7B, "identity"), r"vision\.embed_dim=1024, text\.embed_dim=4096"),
        (lambda: dataclasses.replace(LLAVA, select_layer=4), r"select_layer=4"),
        (lambda: dataclasses.replace(LLAVA, select_layer=-5), r"select_layer=-5"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


def test_the_newline_is_a_part_of_its_own_with_the_originals_starting_values():
    """`initialize_vision_modules` of the original: normal, one over the square root of the width."""
    config = dataclasses.replace(LLAVA, image_newline=True)
    assert set(structure(config)[1]) - set(structure(LLAVA)[1]) == {"image_newline"}
    assert part("image_newline") == "image_newline"
    values = random_parameters(config, {"image_newline"}, seed=0)
    assert {name: value.shape for name, value in values.items()} == {"image_newline": (LLAVA.text.embed_dim,)}
    wide = initial_value("image_newline", (4096,), np.random.default_rng(0))
    assert abs(wide.std() * 4096**0.5 - 1) < 0.05
    assert abs(wide.mean()) < 0.001
    assert partition("image_newline") == PartitionSpec()
