"""Exports: transformers loads them whole and computes the same, and what came in goes out byte for byte."""

import dataclasses
import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llava_jax.convert.chat_template import chat_template_json
from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.conversion import convert
from llava_jax.convert.export import write_original
from llava_jax.convert.folder import read_parameters, write_model_folder, write_weights
from llava_jax.convert.safetensors_file import open_safetensors
from llava_jax.convert.tensor import in_memory
from llava_jax.convert.weights import open_weights
from llava_jax.data.anyres import AnyRes
from llava_jax.data.conversation import IM_END, IM_PATCH, IM_START
from llava_jax.data.records import Turn
from llava_jax.data.templates import V1
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import CheckpointError, UserError
from llava_jax.inference.model import load
from llava_jax.shapes import LinearScaling, Llama3Scaling, LlavaConfig, RopeScaling
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


@pytest.mark.parametrize(("beside", "name"), [("v1", "mistral_instruct"), ("v1", "v0_mmtag"), ("v1", "v1")])
def test_a_chat_template_of_another_tokenizers_folder_is_not_passed_on(
    data: Path, tmp_path: Path, beside: str, name: str
):
    """A base's tokenizer brings the base's; the model was trained with another."""
    make_huggingface(tmp_path / "hf")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / file).write_bytes((data / "tokenizer" / file).read_bytes())
    text = chat_template_json(beside, is_framed=False) or ""
    (tmp_path / "hf" / "chat_template.json").write_text(text)
    convert(str(tmp_path / "hf"), str(tmp_path / "ours"), to="jax")
    card = tmp_path / "ours" / "model.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"template": name}))
    convert(str(tmp_path / "ours"), str(tmp_path / "out"), to="hf")
    written = tmp_path / "out" / "chat_template.json"
    if name == "v0_mmtag":
        assert not written.exists()
    else:
        assert open_checkpoint(str(tmp_path / "out")).template == name
        assert (written.read_text() == text) == (name == beside)


@pytest.mark.parametrize("name", ["mistral_instruct", "v0_mmtag", "v1", None])
def test_a_template_that_the_originals_layout_cannot_say_comes_back(tmp_path: Path, name: str | None):
    model = make_huggingface(tmp_path / "hf")
    write_tower(tmp_path / "clip", numpy_of(model.state_dict()))
    if name == "v0_mmtag":
        # No chat template says it: here the source is a card of ours.
        convert(str(tmp_path / "hf"), str(tmp_path / "ours"), to="jax")
        path = tmp_path / "ours" / "model.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"template": name}))
    elif name is not None:
        (tmp_path / "hf" / "chat_template.json").write_text(chat_template_json(name, is_framed=False) or "")
    source = tmp_path / ("ours" if name == "v0_mmtag" else "hf")
    told = convert(str(source), str(tmp_path / "original"), to="original")
    assert (f"cannot say template {name}; elsewhere give --conv {name}" in told) == (name not in ("v1", None))
    assert open_checkpoint(str(tmp_path / "original")).template == name
    # Whoever does not write the folder's provenance leaves only the guess.
    path = tmp_path / "original" / "provenance.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"template": "v9"}))
    with pytest.raises(CheckpointError, match=r"provenance\.json: Unknown conversation template 'v9'"):
        open_checkpoint(str(tmp_path / "original"))
    path.unlink()
    assert open_checkpoint(str(tmp_path / "original")).template == "v1"


@pytest.mark.parametrize(
    ("scaling", "window", "written"),
    [
        (None, None, None),
        (LinearScaling(factor=4.0), None, {"type": "linear", "factor": 4.0}),
        (LinearScaling(factor=4.0), 5, "Llama, and that linearly; got LinearScaling.* of a Mistral"),
        (
            Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192),
            None,
            "Llama, and that linearly; got Llama3Scaling.* of a Llama",
        ),
    ],
)
def test_rotary_positions_are_scaled_as_the_original_reads_it_or_not_at_all(
    tmp_path: Path, scaling: RopeScaling | None, window: int | None, written: Any
):
    make_huggingface(tmp_path / "hf")
    found = open_checkpoint(str(tmp_path / "hf"))
    assert isinstance(found.model, LlavaConfig)
    text = dataclasses.replace(found.model.text, rope_scaling=scaling, sliding_window=window)
    checkpoint = dataclasses.replace(found, model=dataclasses.replace(found.model, text=text))
    if isinstance(written, str):
        with pytest.raises(CheckpointError, match=written):
            write_original(str(tmp_path / "out"), checkpoint, source="x")
        return
    write_original(str(tmp_path / "out"), checkpoint, source="x")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == written
    assert open_checkpoint(str(tmp_path / "out")).model == checkpoint.model


def test_tokens_of_older_folders_are_not_lost_to_an_export(tmp_path: Path):
    """They list them in two files that nobody reads where the config lists any, as it does for `<image>`."""
    model = importlib.resources.files(pytest.importorskip("mistral_common")) / "data" / "tokenizer.model.v1"
    state = numpy_of(make_huggingface(tmp_path / "hf").state_dict())
    write_tower(tmp_path / "clip", state)
    tensors = rename(state, "original")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = np.zeros((32_004, tensors[key].shape[1]), np.float32)
    config = original_config(vocab_size=32_004, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    folder = write_folder(tmp_path / "original", config, tensors)
    shutil.copyfile(str(model), folder / "tokenizer.model")
    ids = {"[PAD]": 32_000, IM_PATCH: 32_001, IM_START: 32_002, IM_END: 32_003}
    for name, content in (
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("added_tokens.json", ids),
        ("special_tokens_map.json", {"pad_token": "[PAD]", "additional_special_tokens": [IM_START]}),
    ):
        (folder / name).write_text(json.dumps(content))
    convert(str(folder), str(tmp_path / "out"), to="hf")
    before, after = (open_tokenizer(str(path)) for path in (folder, tmp_path / "out"))
    for text, token_id in (ids | {"<image>": 32_004, "<pad>": 32_005}).items():
        assert after.token_id(text) == token_id
    # What the other file says is special stays so.
    text = f"a {IM_START}<s>{IM_END} b"
    np.testing.assert_array_equal(after.encode(text).ids, before.encode(text).ids)
    assert after.decode(after.encode(text).ids.tolist()) == before.decode(before.encode(text).ids.tolist())


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
