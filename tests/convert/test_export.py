"""Exports: transformers loads them whole and computes the same, and what came in goes out byte for byte."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.conversion import convert
from llava_jax.convert.folder import read_parameters, write_model_folder, write_weights
from llava_jax.convert.safetensors_file import open_safetensors
from llava_jax.convert.tensor import in_memory
from llava_jax.convert.weights import open_weights
from llava_jax.data.anyres import AnyRes
from llava_jax.data.records import Turn
from llava_jax.data.templates import V1
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import CheckpointError, UserError
from llava_jax.inference.model import load
from tests.convert.llavas import make_huggingface, numpy_of, original_config, rename, write_folder, write_tower
from tests.models import oracle


def _bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        key: (str(tensor.dtype), tensor.shape, np.ascontiguousarray(tensor.view()).tobytes())
        for key, tensor in open_weights(folder).tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_next", [False, True], ids=["llava", "llava_next"])
def test_hugging_face_to_ours_and_back_is_equal_byte_for_byte(tmp_path: Path, is_next: bool, dtype: torch.dtype):
    model = make_huggingface(tmp_path / "hf", is_next=is_next, dtype=dtype)
    wanted = numpy_of(rename(model.state_dict(), "L1"))
    (tmp_path / "hf" / "model.safetensors").unlink()
    write_folder(tmp_path / "hf", json.loads((tmp_path / "hf" / "config.json").read_text()), wanted)
    convert(str(tmp_path / "hf"), str(tmp_path / "jax"), to="jax")
    convert(str(tmp_path / "jax"), str(tmp_path / "again"), to="hf")
    assert _bytes(tmp_path / "again") == _bytes(tmp_path / "hf")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["image_token_index"] == oracle.IMAGE_ID
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("is_next", [False, True], ids=["llava", "llava_next"])
def test_transformers_loads_an_export_whole_and_computes_the_same(data: Path, tmp_path: Path, is_next: bool):
    theirs = make_huggingface(tmp_path / "hf", is_next=is_next)
    found = open_checkpoint(str(tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(str(tmp_path / "hf"))
    tensors = rename(numpy_of(theirs.state_dict()), "original")
    write_tower(tmp_path / "clip", numpy_of(theirs.state_dict()))
    # A vocabulary without room for new tokens, as Llama's is.
    size = open_tokenizer(str(data / "tokenizer")).vocab_size
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:size]
    changed: dict[str, Any] = {"vocab_size": size}
    if is_next:
        pinpoints = [[32, 16], [16, 32], [32, 32]]
        changed |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints}
        changed["mm_patch_merge_type"] = "spatial_unpad"
    folder = write_folder(tmp_path / "original", original_config(**changed), tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((data / "tokenizer" / name).read_bytes())
    told = convert(str(folder), str(tmp_path / "out"), to="hf")
    assert "LLaVA's own" in told
    assert "rows of the vocabulary" in told
    cls: Any = transformers.LlavaNextForConditionalGeneration if is_next else transformers.LlavaForConditionalGeneration
    model, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    image_id = model.config.image_token_index
    assert image_id == size
    assert image_id < model.config.text_config.vocab_size == -(-(image_id + 2) // 64) * 64
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        np.testing.assert_array_equal(
            model(input_ids=tokens).logits[..., :size].numpy(), theirs(input_ids=tokens).logits[..., :size].numpy()
        )
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == image_id
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."), Turn("user", "Why?")]
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns]
    messages[0]["content"] = [{"type": "text", "text": "What?"}, {"type": "image"}]
    wanted = "".join(span.text for span in V1.render(turns, opened=True))
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == wanted
    if is_next:
        assert processor.image_processor.image_grid_pinpoints == [[16, 32], [32, 16], [32, 32]]
    else:
        assert processor.image_processor.do_pad
    back = open_checkpoint(str(tmp_path / "out"))
    assert back.template == "v1"
    mode = open_checkpoint(str(folder)).image_mode
    assert back.image_mode == (dataclasses.replace(mode, rounding="huggingface") if isinstance(mode, AnyRes) else mode)
    assert set(back.params) == set(found.params)


def test_the_originals_layout_comes_back_as_it_was(data: Path, tmp_path: Path):
    theirs = make_huggingface(tmp_path / "hf", dtype=torch.float16)
    write_tower(tmp_path / "clip", numpy_of(theirs.state_dict()))
    tensors = rename(numpy_of(theirs.state_dict()), "original")
    write_folder(tmp_path / "original", original_config(), tensors)
    convert(str(tmp_path / "original"), str(tmp_path / "jax"), to="jax")
    convert(str(tmp_path / "jax"), str(tmp_path / "out"), to="original")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "original")
    before, after = (open_checkpoint(str(tmp_path / name)) for name in ("original", "out"))
    assert (before.model, before.image_mode, before.template) == (after.model, after.image_mode, after.template)
    assert after.config["mm_vision_tower"] == "clip"
    # A model of ours names no published tower: its shape lies beside its weights.
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), to="original")
    assert open_checkpoint(str(tmp_path / "ours")).model == before.model


def test_what_transformers_lacks_is_refused(data: Path, tmp_path: Path):
    theirs = make_huggingface(tmp_path / "hf")
    write_tower(tmp_path / "clip", numpy_of(theirs.state_dict()))
    tensors = rename(numpy_of(theirs.state_dict()), "original")
    write_folder(tmp_path / "spatial", original_config(mm_patch_merge_type="spatial_unpad"), tensors)
    with pytest.raises(CheckpointError, match=r"missing model\.image_newline"):
        convert(str(tmp_path / "spatial"), str(tmp_path / "out"), to="hf")
    linear = {key: value for key, value in tensors.items() if "mm_projector.2" not in key}
    linear = {key.replace("mm_projector.0", "mm_projector"): value for key, value in linear.items()}
    write_folder(tmp_path / "linear", original_config(mm_projector_type="linear"), linear)
    with pytest.raises(CheckpointError, match="projector; this one is 'linear'"):
        convert(str(tmp_path / "linear"), str(tmp_path / "out"), to="hf")
    assert open_checkpoint(str(tmp_path / "linear")).template is None
    with pytest.raises(UserError, match="--to delta needs --base"):
        convert(str(tmp_path / "linear"), str(tmp_path / "out"), to="delta")
    assert not (tmp_path / "out").exists()


def test_provenance_says_where_weights_come_from(tmp_path: Path):
    make_huggingface(tmp_path / "hf")
    (tmp_path / "hf" / "LICENSE").write_text("terms")
    convert(str(tmp_path / "hf"), str(tmp_path / "jax"), to="jax")
    content = json.loads((tmp_path / "jax" / "provenance.json").read_text())
    assert content["source"] == str(tmp_path / "hf")
    assert list(content["source_sha256"]) == [str(tmp_path / "hf" / "model.safetensors")]
    assert set(content["sha256"]) == {"model.json", "model.safetensors", "source_config.json"}
    assert "LICENSE" in content["licence"]
    assert content["tool"].startswith("llava_jax ")


def test_a_large_folder_is_split_into_shards_and_read_again(tmp_path: Path):
    make_huggingface(tmp_path / "hf")
    params = read_parameters(str(tmp_path / "hf"))
    write_weights(tmp_path, params, shard_bytes=50_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 60_000 for path in shards)
    found = open_weights(tmp_path).tensors
    assert set(found) == set(params)
    assert sum(len(open_safetensors(path)) for path in shards) == len(params)


def test_a_model_of_ours_tells_others_where_its_answers_end(data: Path, tmp_path: Path):
    """Its card has no token ids; without an end, `generate` of transformers would never stop."""
    make_huggingface(tmp_path / "hf")
    checkpoint = dataclasses.replace(open_checkpoint(str(tmp_path / "hf")), label="x", template="v0")
    tokenizer = str(data / "tokenizer")
    write_model_folder(str(tmp_path / "a"), checkpoint.card(), checkpoint.params, tokenizer=tokenizer, source="x")
    for to in ("hf", "original"):
        convert(str(tmp_path / "a"), str(tmp_path / f"to_{to}"), to=to)
        told = json.loads((tmp_path / f"to_{to}" / "generation_config.json").read_text())
        assert told["eos_token_id"] == open_tokenizer(tokenizer).eos_id


def test_a_folder_of_someone_else_is_never_replaced(tmp_path: Path):
    make_huggingface(tmp_path / "hf")
    before = _bytes(tmp_path / "hf")
    with pytest.raises(CheckpointError, match="Only a folder that was written here is replaced"):
        convert(str(tmp_path / "hf"), str(tmp_path / "hf"), to="jax")
    assert _bytes(tmp_path / "hf") == before
    checkpoint = open_checkpoint(str(tmp_path / "hf"))
    write_model_folder(
        str(tmp_path / "a"), dataclasses.replace(checkpoint, label="x").card(), checkpoint.params, tokenizer=None,
        source="x",
    )  # fmt: skip
    # Onto itself: every tensor is written anew before the old folder goes.
    convert(str(tmp_path / "a"), str(tmp_path / "a"), to="jax")
    assert set(open_checkpoint(str(tmp_path / "a")).params) == set(checkpoint.params)
    assert in_memory(np.ones(2), "x").nbytes == 16
