"""Model folders: written and read bit for bit, and refused when anything is missing, strange or damaged."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llava_jax.convert import folder as module
from llava_jax.convert.card import ModelCard, read_card, write_card
from llava_jax.convert.folder import check_parameters, read_parameters, write_model_folder
from llava_jax.convert.provenance import sha256
from llava_jax.data.anyres import AnyRes
from llava_jax.errors import CheckpointError
from llava_jax.inference.model import load
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.parameters import part
from tests.tiny import CLIP, LLAVA

CARD = ModelCard(model=LLAVA, template="v1", image_mode="pad", label="test")


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    return random_parameters(LLAVA, {"tower", "projector", "decoder"}, seed=0)


@pytest.fixture
def folder(params: dict[str, np.ndarray], data: Path, tmp_path: Path) -> Path:
    write_model_folder(str(tmp_path / "model"), CARD, params, tokenizer=str(data / "tokenizer"), source="random")
    return tmp_path / "model"


def _same(found: Any, wanted: Any) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_what_is_written_is_read_bit_for_bit(folder: Path, params: dict[str, np.ndarray]):
    _same(read_parameters(str(folder)), params)
    assert read_card(folder) == CARD
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "model.json",
        "tokenizer",
        "provenance.json",
    }


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_every_dtype_and_memory_order_survives(data: Path, tmp_path: Path, dtype: Any):
    """Turned matrices, as the conversion makes them, are views in Fortran order."""
    value = np.random.default_rng(0).standard_normal((6, 4)).astype(dtype)
    params = {"a": value, "b": value.T, "c": value[::2], "d": value[0], "e": np.asarray(value[0, 0])}
    write_model_folder(str(tmp_path / "model"), CARD, params, tokenizer=str(data / "tokenizer"), source="test")
    _same(read_parameters(str(tmp_path / "model")), params)


NEXT = dataclasses.replace(LLAVA, image_newline=True)
ANYRES = AnyRes(pinpoints=((16, 32), (32, 16)), merge="spatial_unpad", rounding="huggingface")


def test_a_card_keeps_the_resolutions_and_their_order(tmp_path: Path):
    card = ModelCard(model=NEXT, template="v1", image_mode=ANYRES, label="next")
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pinpoints": [[16, 20]]}, "multiples of the tower's image_size=16"),
        ({"pinpoints": [[16, 32, 16]]}, "image_mode|pinpoints|argument"),
        ({"pinpoints": [["16", 32]]}, "AnyRes.pinpoints must be"),
        ({"pinpoints": []}, r"AnyRes\.pinpoints must hold pairs"),
        ({"merge": "maxpool"}, "AnyRes.merge must be .*got 'maxpool'"),
        ({"tiles": 3}, r"does not know \['tiles'\]"),
    ],
)
def test_a_damaged_image_mode_is_refused(tmp_path: Path, change: dict, message: str):
    write_card(tmp_path, ModelCard(model=NEXT, template="v1", image_mode=ANYRES, label="next"))
    _edit(lambda card: card["image_mode"].update(change))(tmp_path / "model.json")
    with pytest.raises(CheckpointError, match=message):
        read_card(tmp_path)


def test_a_model_without_newlines_cannot_end_rows_with_them():
    with pytest.raises(ValueError, match="image_newline=False"):
        ModelCard(model=LLAVA, template="v1", image_mode=ANYRES, label="next")


@pytest.mark.parametrize("model", [LLAVA, CLIP], ids=["llava", "clip"])
@pytest.mark.parametrize("template", ["v1", None])
def test_a_card_is_read_as_it_was_written(tmp_path: Path, model: Any, template: str | None):
    card = ModelCard(model=model, template=template, image_mode="square", label="a label")
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card


def test_provenance_names_every_file_and_its_hash(folder: Path):
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["source"] == "random"
    assert set(provenance["sha256"]) == {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json"
    }
    for name, digest in provenance["sha256"].items():
        assert sha256(folder / name) == digest


def test_writing_again_replaces_the_folder(folder: Path, params: dict[str, np.ndarray], data: Path):
    other = {name: value + 1 for name, value in params.items()}
    write_model_folder(str(folder), CARD, other, tokenizer=str(folder / "tokenizer"), source="again")
    _same(read_parameters(str(folder)), other)
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_write_that_fails_leaves_the_old_folder_and_nothing_else(
    folder: Path, params: dict[str, np.ndarray], data: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "write_card", fail)
    with pytest.raises((OSError, CheckpointError), match="no space left"):
        write_model_folder(str(folder), CARD, params, tokenizer=str(data / "tokenizer"), source="again")
    _same(read_parameters(str(folder)), params)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_that_is_no_model_is_never_replaced(params: dict[str, np.ndarray], data: Path, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="home"):
        write_model_folder(str(tmp_path / "home"), CARD, params, tokenizer=str(data / "tokenizer"), source="x")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_place_that_cannot_be_written_is_refused(params: dict[str, np.ndarray], data: Path, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere/model")):
        with pytest.raises(CheckpointError, match=str(place)):
            write_model_folder(str(place), CARD, params, tokenizer=str(data / "tokenizer"), source="here")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_model_folder(str(tmp_path / "link"), CARD, params, tokenizer=str(data / "tokenizer"), source="here")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.json").is_file()


def test_parts_are_read_alone(folder: Path, params: dict[str, np.ndarray]):
    found = read_parameters(str(folder), {"projector"})
    _same(found, {name: value for name, value in params.items() if part(name) == "projector"})
    with pytest.raises(CheckpointError, match=r"has no part caption; it has decoder, projector, tower\. Mend init"):
        read_parameters(str(folder), {"caption", "tower"})


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text(path.read_text()[:100]), r"model\.json must describe a model"),
        (lambda path: path.write_text("[]"), r"model\.json must describe a model"),
        (lambda path: path.write_text(""), r"model\.json must describe a model"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), r"model\.json must describe a model"),
        (_edit(lambda card: card.update(format=2)), "its format is not 1; a newer llava_jax wrote it"),
        (_edit(lambda card: card.update(kind="bert")), "bert"),
        (_edit(lambda card: card.update(colour="red")), r"does not know \['colour'\]"),
        (_edit(lambda card: card.pop("label")), r"lacks \['label'\]"),
        (_edit(lambda card: card["model"]["text"].update(rope_scaling=2)), "rope_scaling must be .*; got 2"),
        (_edit(lambda card: card["model"]["text"].update(rope_scaling={"factor": 0.5})), "factor must be at least 1"),
        (_edit(lambda card: card["model"]["vision"].pop("norm_eps")), r"lacks \['norm_eps'\]"),
        (_edit(lambda card: card["model"]["text"].update(num_layers="3")), "num_layers must be .*int.*; got '3'"),
        (_edit(lambda card: card["model"]["text"].update(num_kv_heads=3)), "num_kv_heads=3"),
        (_edit(lambda card: card["model"].update(projector="mlp")), "got 'mlp'"),
        (_edit(lambda card: card["model"].update(text=None)), "text must be"),
        (_edit(lambda card: card.update(image_mode="crop")), "image_mode"),
        (_edit(lambda card: card["model"].update(select_feature="cls")), "select_feature"),
        (_edit(lambda card: card.update(template="v9")), r"model\.json must .*Unknown conversation template 'v9'"),
        (_edit(lambda card: card["model"]["text"].update(norm_eps=float("nan"))), "norm_eps must be finite"),
        (_edit(lambda card: card["model"]["text"].update(num_layers=10**9)), "num_layers must be at most"),
        (lambda path: path.write_text("[" * 200_000), r"model\.json must describe a model"),
    ],
)
def test_a_damaged_card_is_refused(folder: Path, damage: Callable[[Path], None], message: str):
    damage(folder / "model.json")
    with pytest.raises(CheckpointError, match=message):
        load(str(folder))


def test_a_whole_number_is_a_float(folder: Path):
    """`rope_theta=10_000` in a config, or another tool's JSON, has no decimal point."""
    _edit(lambda card: card["model"]["text"].update(rope_theta=10_000))(folder / "model.json")
    assert read_card(folder) == CARD


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
def test_cut_weights_are_refused(folder: Path, kept: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors must be a safetensors file.*Write it again"):
        load(str(folder))


def test_missing_strange_and_misshapen_tensors_are_named(folder: Path, params: dict[str, np.ndarray]):
    changed = dict(params)
    del changed["decoder.norm.scale"]
    changed["decoder.extra"] = np.zeros(1, np.float32)
    name = "decoder.layers.0.mlp.up_proj.kernel"
    changed[name] = params[name].astype(np.int8)
    changed["projector.linear.0.kernel"] = params["projector.linear.0.kernel"][1:]
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(str(folder))
    for words in (
        "missing decoder.norm.scale",
        "unexpected decoder.extra",
        "projector.linear.0.kernel is (31, 32), must be (32, 32)",
        "decoder.layers.0.mlp.up_proj.kernel is int8, which holds no weights",
    ):
        assert words in str(caught.value)


def test_many_problems_are_counted(params: dict[str, np.ndarray]):
    with pytest.raises(CheckpointError, match=rf"and {len(params) - 8} more\. Check its shape"):
        check_parameters({}, structure(LLAVA)[1], "nothing")


def test_weights_that_are_not_there_are_refused(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"must hold model\.safetensors"):
        load(str(folder))


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_of_nothing_is_refused(tmp_path: Path, name: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=name):
        read_parameters(str(tmp_path / name))


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"lm_head.weight": 1}}',
        '{"weight_map": {"lm_head.weight": null}}',
        '{"weight_map": {"lm_head.weight": "../outside.safetensors"}}',
        '{"weight_map": {"lm_head.weight": "absent.safetensors"}}',
        '{"weight_map": {"lm_head.weight": "absent.safetensors", "lm_head.weight": "one.safetensors"}}',
        '{"weight_map": {"lm_head.weight": "' + 5000 * "n" + '"}}',
        '{"weight_map": {"lm_head.weight": "a\\u0000b"}}',
        '{"weight_map": {"lm_head.weight": "one.safetensors", "model.norm.weight": "one.safetensors"}}',
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, index: str):
    (tmp_path / "config.json").write_text("{}")
    save_file({"lm_head.weight": np.ones((2, 2), np.float32)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError):
        read_parameters(str(tmp_path))


def test_cards_hold_all_that_a_shape_does():
    """A field that is added to a shape is written and asked for without another line of code."""
    names = {"model", "template", "image_mode", "label", "mm_use_im_start_end"}
    assert {field.name for field in dataclasses.fields(ModelCard)} == names
