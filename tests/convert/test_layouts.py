"""Names and memory of Hugging Face tensors: every key used once, every element in its place."""

import re

import numpy as np
import pytest

from llava_jax.convert.layouts import change_layout, from_huggingface, our_name
from llava_jax.errors import CheckpointError

NAMES = {
    # transformers up to 4.51, as on the hub; since then; the original's own checkpoints.
    "language_model.model.layers.3.self_attn.q_proj.weight": "decoder.layers.3.self_attn.q_proj.kernel",
    "model.language_model.layers.3.self_attn.q_proj.weight": "decoder.layers.3.self_attn.q_proj.kernel",
    "model.layers.3.self_attn.q_proj.weight": "decoder.layers.3.self_attn.q_proj.kernel",
    "language_model.lm_head.weight": "decoder.lm_head.kernel",
    "lm_head.weight": "decoder.lm_head.kernel",
    "model.embed_tokens.weight": "decoder.embed_tokens.embedding",
    "model.norm.weight": "decoder.norm.scale",
    "model.layers.11.post_attention_layernorm.weight": "decoder.layers.11.post_attention_layernorm.scale",
    "model.layers.0.mlp.down_proj.weight": "decoder.layers.0.mlp.down_proj.kernel",
    "multi_modal_projector.linear_1.weight": "projector.linear.0.kernel",
    "model.multi_modal_projector.linear_2.bias": "projector.linear.1.bias",
    "model.mm_projector.weight": "projector.linear.0.kernel",
    "model.mm_projector.bias": "projector.linear.0.bias",
    "model.mm_projector.0.weight": "projector.linear.0.kernel",
    "model.mm_projector.2.bias": "projector.linear.1.bias",
    "model.mm_projector.4.weight": "projector.linear.2.kernel",
    "vision_tower.vision_model.embeddings.class_embedding": "tower.class_embedding",
    "model.vision_tower.vision_model.pre_layrnorm.bias": "tower.pre_layernorm.bias",
    # As transformers 5 writes it.
    "vision_tower.embeddings.patch_embedding.weight": "tower.patch_embedding.kernel",
    "model.vision_tower.encoder.layers.7.mlp.fc1.bias": "tower.layers.7.mlp.fc1.bias",
    # The original wraps the tower twice.
    "model.vision_tower.vision_tower.vision_model.post_layernorm.weight": "tower.post_layernorm.scale",
    "vision_model.embeddings.position_embedding.weight": "tower.position_embedding",
    "vision_model.encoder.layers.7.self_attn.out_proj.weight": "tower.layers.7.self_attn.out_proj.kernel",
    "text_model.encoder.layers.2.layer_norm1.weight": "caption.layers.2.layer_norm1.scale",
    "text_model.embeddings.token_embedding.weight": "caption.token_embedding.embedding",
    "text_model.final_layer_norm.bias": "caption.final_layer_norm.bias",
    "visual_projection.weight": "visual_projection.kernel",
    "text_projection.weight": "text_projection.kernel",
    "logit_scale": "logit_scale",
    "image_newline": "image_newline",
    "model.image_newline": "image_newline",
}

UNKNOWN = [
    "model.mm_projector.1.weight",
    "model.image_newline.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.rotary_emb.cos",
    "language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
    "vision_model.head.weight",
    "score.weight",
    "transformer.wte.weight",
    "decoder.norm.weight",
]


@pytest.mark.parametrize("theirs", NAMES)
def test_a_known_key_has_one_name(theirs: str):
    found = our_name(theirs)
    assert found is not None
    assert found[0] == NAMES[theirs]


@pytest.mark.parametrize("theirs", UNKNOWN)
def test_an_unknown_key_is_refused_by_name(theirs: str):
    assert our_name(theirs) is None
    tensors = {"model.norm.weight": np.ones(3, np.float32), theirs: np.ones((3, 3), np.float32)}
    with pytest.raises(CheckpointError, match=f"no rule knows {re.escape(theirs)}\\. "):
        from_huggingface(tensors)


def test_many_unknown_keys_are_counted():
    with pytest.raises(CheckpointError, match=r"no rule knows x\.00, .*x\.07 and 4 more\."):
        from_huggingface({f"x.{i:02}": np.ones(1) for i in range(12)})


def test_two_keys_of_one_parameter_are_refused():
    value = np.ones((2, 3), np.float32)
    with pytest.raises(CheckpointError, match=r"Two tensors of the checkpoint mean decoder\.lm_head\.kernel"):
        from_huggingface({"lm_head.weight": value, "language_model.lm_head.weight": value})


def test_buffers_are_no_parameters():
    tensors = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "vision_model.embeddings.position_ids": np.arange(5)[None],
        "model.norm.weight": np.ones(3, np.float32),
    }
    assert set(from_huggingface(tensors)) == {"decoder.norm.scale"}


def test_a_matrix_is_turned():
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = change_layout(value, "matrix")
    np.testing.assert_array_equal(found, [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(change_layout(found, "matrix"), value)


def test_a_patch_kernel_reads_pixels_row_by_row_colours_last():
    """Element [out, colour, y, x] of theirs is [(y * size + x) * 3 + colour, out] of ours."""
    value = np.arange(5 * 3 * 2 * 2).reshape(5, 3, 2, 2)
    found = change_layout(value, "patches")
    assert found.shape == (12, 5)
    for out, colour, y, x in np.ndindex(value.shape):
        assert found[(y * 2 + x) * 3 + colour, out] == value[out, colour, y, x]
    back = found.reshape(2, 2, 3, 5).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(back, value)


def test_dtypes_are_kept():
    for dtype in (np.float16, np.float32):
        (value,) = from_huggingface({"lm_head.weight": np.ones((2, 3), dtype)}).values()
        assert value.dtype == dtype
