"""Opening checkpoints: every layout is the same model, every key is accounted for, and what is hostile is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.config_json import text_fields
from llava_jax.convert.fields import Fields
from llava_jax.convert.layouts import from_huggingface
from llava_jax.convert.preprocessing import image_mode_of_original, preprocessor_fields
from llava_jax.data.anyres import AnyRes
from llava_jax.errors import CheckpointError
from tests.convert.llavas import make_huggingface, numpy_of, original_config, rename, write_folder, write_tower
from tests.models import oracle
from tests.tiny import LLAVA, TEXT, VISION

CONFIG = oracle.llava_config(LLAVA).to_dict()


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Tensors of a small `llava_next` under the names that version 5 has in memory."""
    return numpy_of(make_huggingface(tmp_path_factory.mktemp("hf"), is_next=True).state_dict())


@pytest.fixture(scope="module")
def plain(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value for key, value in state.items() if key != "model.image_newline"}


def _same(params: Any, wanted: dict[str, np.ndarray]) -> None:
    expected = from_huggingface(wanted)
    assert set(params) == set(expected)
    for name, value in expected.items():
        assert params[name].shape == value.shape, name
        np.testing.assert_array_equal(np.asarray(params[name]), value, err_msg=name)


@pytest.mark.parametrize("layout", ["L1", "L2", "L3", "L4"])
@pytest.mark.parametrize("is_next", [False, True], ids=["llava", "llava_next"])
def test_every_layout_of_transformers_is_the_same_model(
    state: dict[str, np.ndarray], plain: dict[str, np.ndarray], tmp_path: Path, layout: str, is_next: bool
):
    tensors = state if is_next else plain
    config = CONFIG | ({"model_type": "llava_next", "image_grid_pinpoints": [[16, 32], [32, 32]]} if is_next else {})
    found = open_checkpoint(str(write_folder(tmp_path / "m", config, rename(tensors, layout))))
    _same(found.params, tensors)
    if is_next:
        mode = AnyRes(pinpoints=((32, 16), (32, 32)), merge="spatial_unpad", rounding="huggingface")
        assert found.image_mode == mode
    else:
        assert (found.model, found.image_mode) == (LLAVA, "square")


@pytest.mark.parametrize("inside", [True, False], ids=["tower inside", "tower apart"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards", "bin shards"])
def test_the_originals_layout_is_the_same_model(plain: dict[str, np.ndarray], tmp_path: Path, inside: bool, kind: str):
    write_tower(tmp_path / "clip", plain)
    tensors = rename(plain, "original")
    if not inside:
        tensors = {key: value for key, value in tensors.items() if "vision_tower" not in key}
    folder = write_folder(tmp_path / "m", original_config(), tensors)
    if kind != "safetensors":
        (folder / "model.safetensors").unlink()
        _write(folder, kind, tensors)
    found = open_checkpoint(str(folder))
    _same(found.params, plain)
    assert (found.model, found.image_mode, found.template) == (LLAVA, "pad", "v1")
    assert found.has_tower == inside


def _write(folder: Path, kind: str, tensors: dict[str, np.ndarray]) -> None:
    names = sorted(tensors)
    halves = {"1": names[::2], "2": names[1::2]} if "shards" in kind else {"": names}
    base, where = "pytorch_model.bin" if "bin" in kind else "model.safetensors", {}
    for number, keys in halves.items():
        name = base.replace(".", f"-0000{number}-of-00002.") if number else base
        where |= dict.fromkeys(keys, name)
        part = {key: np.ascontiguousarray(tensors[key]) for key in keys}
        if "bin" in kind:
            torch.save({key: torch.tensor(value) for key, value in part.items()}, folder / name)
        else:
            save_file(part, folder / name)
    if "shards" in kind:
        (folder / f"{base}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_decoder_with_buffers_and_a_tied_head_is_accounted_for(plain: dict[str, np.ndarray], tmp_path: Path):
    tensors = {key: v for key, v in rename(plain, "original").items() if "vision" not in key and "mm_" not in key}
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    buffer = (1.0 / 10_000.0 ** (np.arange(0, 8, 2) / 8)).astype(np.float32)
    folder = write_folder(tmp_path / "m", text_fields(TEXT), tensors | {key: buffer})
    found = open_checkpoint(str(folder))
    assert found.model == TEXT
    assert len(found.params) == len(tensors)
    assert any(key in note for note in found.notes)
    write_folder(folder, text_fields(TEXT), tensors | {key: buffer * 2})
    with pytest.raises(CheckpointError, match="inv_freq holds other values"):
        open_checkpoint(str(folder))

    tied = text_fields(TEXT) | {"tie_word_embeddings": True}
    write_folder(folder, tied, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert "decoder.lm_head.kernel" not in open_checkpoint(str(folder)).params
    write_folder(folder, tied, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must equal .*model\.embed_tokens\.weight"):
        open_checkpoint(str(folder))
    write_folder(folder, text_fields(TEXT), {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight"):
        open_checkpoint(str(folder))


def test_missing_unexpected_and_misshapen_keys_are_all_named(plain: dict[str, np.ndarray], tmp_path: Path):
    tensors = rename(plain, "L1")
    del tensors["language_model.model.norm.weight"]
    extra = "language_model.model.layers.7.input_layernorm.weight"
    tensors[extra] = np.ones(32, np.float32)
    whole = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[whole] = tensors[whole].astype(np.int8)
    shape = "vision_tower.vision_model.post_layernorm.bias"
    tensors[shape] = tensors[shape][:5]
    folder = write_folder(tmp_path / "m", CONFIG, tensors)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    for words in (
        "missing model.norm.weight",
        f"model.safetensors: {extra}",
        f"{shape} is (5,) here, must be (32,)",
        f"{whole} is int8, ",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def _cut(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _lose(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _escape(folder: Path) -> None:
    shutil.copyfile(folder / "model-00002-of-00002.safetensors", folder.parent / "out.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00002-of-00002.safetensors", "../out.safetensors"))


def _repeat(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    first = load_file(folder / "model-00001-of-00002.safetensors")
    key = sorted(first)[0]
    save_file(load_file(path) | {key: first[key]}, path)


def _forget(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut, r"model-00001-of-00002\.safetensors must be a safetensors file: .* takes bytes"),
        (_lose, r"model-00002-of-00002\.safetensors is missing, the shard of \S+ and \d+ more"),
        (_escape, r"index\.json names '\.\./out\.safetensors'"),
        (_repeat, r"model-00002-of-00002\.safetensors holds \S+, which an earlier shard holds too"),
        (_forget, r"unexpected \['lm_head\.weight'\]"),
    ],
)
def test_harmed_shards_are_refused_with_file_and_key(
    plain: dict[str, np.ndarray], tmp_path: Path, harm: Callable[[Path], None], message: str
):
    write_tower(tmp_path / "clip", plain)
    tensors = rename(plain, "original")
    folder = write_folder(tmp_path / "m", original_config(), tensors)
    (folder / "model.safetensors").unlink()
    _write(folder, "shards", tensors)
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_a_projector_without_its_decoder_asks_for_it(plain: dict[str, np.ndarray], tmp_path: Path):
    (tmp_path / "m").mkdir()
    keys = {key: torch.tensor(v) for key, v in rename(plain, "original").items() if "mm_projector" in key}
    torch.save(keys, tmp_path / "m" / "mm_projector.bin")
    (tmp_path / "m" / "config.json").write_text(json.dumps(original_config()))
    with pytest.raises(CheckpointError, match="as --base"):
        open_checkpoint(str(tmp_path / "m"))
    alone = open_checkpoint(str(tmp_path / "m" / "mm_projector.bin"))
    assert set(alone.params) == {f"projector.linear.{i}.{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")}


@pytest.mark.parametrize(
    ("preprocessor", "mode"),
    [
        ({}, "square"),
        ({"do_pad": True}, "pad"),
        ({"size": {"shortest_edge": 20}}, r"size=\{'shortest_edge': 20\} is not supported"),
        ({"resample": 2}, "resample=2"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean="),
        ({"do_center_crop": False}, "do_center_crop=False"),
    ],
)
def test_pictures_are_prepared_as_the_preprocessor_says_or_not_at_all(
    plain: dict[str, np.ndarray], tmp_path: Path, preprocessor: dict[str, Any], mode: str
):
    folder = write_folder(tmp_path / "m", CONFIG, rename(plain, "L1"))
    content = {"crop_size": {"height": 16, "width": 16}, "size": {"shortest_edge": 16}, "resample": 3} | preprocessor
    for name, written in (
        ("preprocessor_config.json", content),
        ("processor_config.json", {"image_processor": content}),
    ):
        (folder / name).write_text(json.dumps(written))
        if mode in ("square", "pad"):
            assert open_checkpoint(str(folder)).image_mode == mode
        else:
            with pytest.raises(CheckpointError, match=mode):
                open_checkpoint(str(folder))
        (folder / name).unlink()


@pytest.mark.parametrize("inside", [True, False], ids=["tower inside", "tower apart"])
@pytest.mark.parametrize(
    ("change", "message"),
    [({}, None), ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean="), ({"crop_size": 20}, "crop_size=20")],
)
def test_an_originals_pictures_are_prepared_as_its_tower_says_or_not_at_all(
    plain: dict[str, np.ndarray], tmp_path: Path, inside: bool, change: dict[str, Any], message: str | None
):
    write_tower(tmp_path / "clip", plain)
    said = json.dumps(preprocessor_fields("square", VISION) | change)
    (tmp_path / "clip" / "preprocessor_config.json").write_text(said)
    tensors = rename(plain, "original")
    if not inside:
        tensors = {key: value for key, value in tensors.items() if "vision_tower" not in key}
    write_folder(tmp_path / "m", original_config(), tensors)
    if message is None:
        assert open_checkpoint(str(tmp_path / "m")).image_mode == "pad"
        return
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json: {message}"):
        open_checkpoint(str(tmp_path / "m"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "m: AnyRes.merge=spatial_unpad arranges patches alone"),
        ({"image_grid_pinpoints": [[16, 40]]}, "m: AnyRes.pinpoints must be multiples of the tower's image_size=16"),
    ],
)
def test_a_way_to_look_at_pictures_that_the_model_has_not_is_refused(
    state: dict[str, np.ndarray], tmp_path: Path, change: dict[str, Any], message: str
):
    config = CONFIG | {"model_type": "llava_next", "image_grid_pinpoints": [[16, 32]], **change}
    folder = write_folder(tmp_path / "m", config, rename(state, "L1"))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    "grid",
    [
        [[336, 672], [672, 336]],
        "[[336, 672], [672, 336]]",
        "[(336, 672), (672, 336),]",
        "((336, 672), (672, 336))",
    ],
)
def test_pinpoints_may_be_the_text_of_a_python_list(grid: Any):
    config = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": grid}
    mode = image_mode_of_original(Fields(config, "config.json"))
    assert mode == AnyRes(pinpoints=((336, 672), (672, 336)), merge="flat", rounding="original")


@pytest.mark.parametrize("grid", ["(1x1),...,(6x6)", "", "[(336, 672, 1)]", "(336, 672)", "(" * 99_999, "-" * 99_999])
def test_pinpoints_of_another_kind_are_refused_as_they_are_written(grid: str):
    config = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": grid}
    with pytest.raises(CheckpointError, match=r"config\.json: image_grid_pinpoints must be pairs of sizes") as caught:
        image_mode_of_original(Fields(config, "config.json"))
    assert grid[:20] in str(caught.value)


def test_a_name_that_is_no_path_and_no_hub_name_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(str(tmp_path / "nowhere"))
    assert VISION.image_size == 16
