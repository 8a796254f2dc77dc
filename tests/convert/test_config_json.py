"""config.json: transformers' own configs become our shapes, and what is not handled is refused by name."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers

from llava_jax.convert.config_json import (
    find_family,
    read_clip,
    read_huggingface,
    read_original,
    read_text,
    read_vision,
    special_tokens,
    text_fields,
)
from llava_jax.convert.fields import Fields, read_json
from llava_jax.errors import CheckpointError
from llava_jax.shapes import LinearScaling, Llama3Scaling, RopeScaling, TextConfig
from llava_jax.sizes import CLIP_L_336, LLAVA_15_7B, VICUNA_7B
from tests.models import oracle
from tests.tiny import CLIP, LLAVA, TEXT

LLAMA3 = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192)
WINDOW = dataclasses.replace(TEXT, sliding_window=5)
# As it lies on the hub: what equals transformers' defaults is left out.
LLAVA_15_HF = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.36.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}
LLAVA_15 = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "use_mm_proj": True,
    "vocab_size": 32000,
}


def _fields(values: dict[str, Any]) -> Fields:
    return Fields(values, "config.json")


def _read_text(values: dict[str, Any]) -> TextConfig:
    fields = _fields(values)
    config = read_text(fields, values["model_type"])
    fields.done()
    return config


def test_published_configs_are_the_known_sizes():
    text = dataclasses.replace(VICUNA_7B, vocab_size=32_064)
    assert read_huggingface(_fields(LLAVA_15_HF)) == dataclasses.replace(LLAVA_15_7B, text=text)
    assert read_original(_fields(LLAVA_15), CLIP_L_336) == LLAVA_15_7B
    assert find_family(_fields(LLAVA_15_HF)) == "huggingface"
    assert find_family(_fields(LLAVA_15)) == "original"
    assert special_tokens(_fields(LLAVA_15_HF)).image_id == 32_000


@pytest.mark.parametrize("scaling", [None, LinearScaling(factor=2.5), LLAMA3], ids=["default", "linear", "llama3"])
@pytest.mark.parametrize("config", [TEXT, WINDOW], ids=["llama", "mistral"])
def test_transformers_reads_our_fields_and_we_read_its(config: TextConfig, scaling: RopeScaling | None):
    config = dataclasses.replace(config, rope_theta=5e5, rope_scaling=scaling)
    fields = text_fields(config)
    assert _read_text(fields) == config
    cls = transformers.LlamaConfig if config.sliding_window is None else transformers.MistralConfig
    assert _read_text(cls(**fields).to_dict()) == config
    # As version 4 wrote it.
    before = {name: value for name, value in fields.items() if name != "rope_parameters"}
    assert _read_text(before) == config


def test_a_window_of_null_is_none_and_an_absent_one_is_the_default():
    mistral = text_fields(WINDOW)
    assert _read_text(mistral | {"sliding_window": None}).sliding_window is None
    del mistral["sliding_window"]
    assert _read_text(mistral).sliding_window == transformers.MistralConfig().sliding_window


def test_towers_and_clip_are_read_from_transformers_configs():
    theirs = oracle.clip_config(CLIP).to_dict()
    assert read_clip(_fields(theirs)) == CLIP
    fields = _fields(theirs["vision_config"])
    assert read_vision(fields) == CLIP.vision
    fields.done()
    assert read_huggingface(_fields(oracle.llava_config(LLAVA).to_dict())) == LLAVA
    default = read_huggingface(_fields(transformers.LlavaConfig().to_dict()))
    assert default.vision == CLIP_L_336
    assert read_huggingface(_fields({"model_type": "llava", "text_config": {}, "vision_config": {}})) == default


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ({"sliding_window": 9}, "sliding_window=9"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "must have the field factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta=1"),
        ({"rope_theta": 5.0}, r"base of the rotary positions is 5\.0 in rope_theta, 10000\.0 in rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"scaling of the rotary positions is None in rope_param"),
        ({"rope_theta": 0.0, "rope_parameters": None}, "rope_theta must be finite and above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"num_hidden_layers": 10**9}, "num_layers must be at most 1000"),
        ({"max_position_embeddings": 0}, "max_positions must be at least 1"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"hidden_size": "32"}, "hidden_size must be int; got '32'"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    ],
)
def test_a_field_that_would_change_the_numbers_is_refused_by_name(change: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message) as caught:
        _read_text(text_fields(TEXT) | change)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "mean"}, "vision_feature_select_strategy='mean'"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer must be int"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, "tie_word_embeddings is True"),
        ({"text_config": {"model_type": "qwen2"}}, "decoder of model_type='qwen2'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "tower of model_type='siglip_vision_model'"),
        ({"vision_config": {"hidden_act": "relu"}}, "vision_config: hidden_act='relu'"),
        ({"text_config": []}, "text_config must be dict"),
    ],
)
def test_a_llava_that_is_not_ours_is_refused_by_name(change: dict[str, Any], message: str):
    with pytest.raises(CheckpointError, match=message):
        read_huggingface(_fields(LLAVA_15_HF | change))


@pytest.mark.parametrize(
    ("name", "value"), [("eos_token_id", "two"), ("eos_token_id", [1, "x"]), ("pad_token_id", True)]
)
def test_an_id_that_is_none_is_refused(name: str, value: Any):
    with pytest.raises(CheckpointError, match=rf"config\.json: {name} must be a token id"):
        special_tokens(Fields({name: value}, "config.json"))


def test_a_field_that_is_there_twice_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8, "vocab_size": 9, "hidden_size": 16}')
    with pytest.raises(CheckpointError, match=r"config\.json must be JSON: it names hidden_size twice"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["llava_onevision", "qwen2", "siglip", None, ["llava"]])
def test_other_models_are_refused_by_name(kind: Any):
    with pytest.raises(CheckpointError, match="model_type="):
        find_family(_fields({"model_type": kind}))


@pytest.mark.parametrize("name", ["mm_resampler_type", "add_faster_video", "s2"])
def test_parts_that_the_original_can_add_are_refused_by_name(name: str):
    with pytest.raises(CheckpointError, match=name):
        read_original(_fields(LLAVA_15 | {name: "spatial_pool"}), CLIP_L_336)
