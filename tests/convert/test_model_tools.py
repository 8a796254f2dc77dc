"""Deltas, adapters and projectors on their bases, and what is refused of them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.config_json import text_fields
from llava_jax.convert.conversion import convert
from llava_jax.convert.vocabulary import grow_rows
from llava_jax.data.conversation import IM_END, IM_PATCH, IM_START, IMAGE_TOKEN
from llava_jax.data.records import Turn
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import CheckpointError
from llava_jax.inference.model import load
from tests.convert.llavas import make_huggingface, numpy_of, original_config, rename, write_folder, write_tower
from tests.tiny import TEXT

RANK, ALPHA = 3, 12
Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
Q_PROJ = "decoder.layers.1.self_attn.q_proj.kernel"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`clip`, `base` (a decoder), `target` (a LLaVA tuned from it), `projector` and `other`, a base of other values."""
    root = tmp_path_factory.mktemp("tools")
    state = numpy_of(make_huggingface(root / "hf").state_dict())
    write_tower(root / "clip", state)
    target = {key: v for key, v in rename(state, "original").items() if "vision_tower" not in key}
    rng = np.random.default_rng(0)

    def near(value: np.ndarray, scale: float) -> np.ndarray:
        return (value + scale * rng.standard_normal(value.shape)).astype(np.float32)

    decoder = {key: value for key, value in target.items() if "mm_projector" not in key}
    base = {key: near(value, 0.01) for key, value in decoder.items()}
    # The target's vocabulary has grown by two.
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        base[key] = base[key][:-2]
    config = text_fields(dataclasses.replace(TEXT, vocab_size=TEXT.vocab_size - 2))
    write_folder(root / "base", config, base)
    write_folder(root / "other", config, {key: near(value, 0.01) for key, value in base.items()})
    write_folder(root / "target", original_config(), target)
    (root / "projector").mkdir()
    kept = {key: torch.tensor(value) for key, value in target.items() if "mm_projector" in key}
    torch.save(kept, root / "projector" / "mm_projector.bin")
    (root / "projector" / "config.json").write_text(json.dumps(original_config(tune_mm_mlp_adapter=True)))
    return root


def _open(folder: Path, base: Path | None = None) -> dict[str, np.ndarray]:
    found = open_checkpoint(str(folder), base=None if base is None else str(base))
    return {name: np.asarray(value) for name, value in found.params.items()}


def test_a_delta_added_to_its_base_is_the_target(folders: Path, tmp_path: Path):
    made = folders / "delta"
    convert(str(folders / "target"), str(made), to="delta", base=str(folders / "base"))
    target, base, delta = _open(folders / "target"), _open(folders / "base"), _open(made)
    name = "decoder.embed_tokens.embedding"
    np.testing.assert_array_equal(delta[name][:-2], target[name][:-2] - base[name])
    np.testing.assert_array_equal(delta[name][-2:], target[name][-2:])
    np.testing.assert_array_equal(delta["projector.linear.0.kernel"], target["projector.linear.0.kernel"])
    recovered = _open(made, folders / "base")
    assert set(recovered) == set(target)
    for name, value in target.items():
        np.testing.assert_allclose(recovered[name], value, atol=1e-6, rtol=0, err_msg=name)
    with pytest.raises(CheckpointError, match="other is not the base of .*delta"):
        _open(made, folders / "other")


def test_what_is_no_delta_is_not_added_to_anything(folders: Path):
    with pytest.raises(CheckpointError, match=r"norm.*belongs to no delta"):
        _open(folders / "target", folders / "base")
    with pytest.raises(CheckpointError, match="is not the base of this checkpoint"):
        _open(folders / "target", folders / "clip")
    with pytest.raises(CheckpointError, match="--base is for deltas"):
        _open(folders / "hf", folders / "base")


def test_a_projector_takes_its_base_and_new_tokens_start_from_the_mean(folders: Path):
    found = open_checkpoint(str(folders / "projector"), base=str(folders / "base"))
    assert found.template == "plain"
    base, target = _open(folders / "base"), _open(folders / "target")
    for name, value in found.params.items():
        if name.startswith("projector"):
            np.testing.assert_array_equal(np.asarray(value), target[name])
        elif name == "decoder.lm_head.kernel":
            np.testing.assert_array_equal(np.asarray(value), grow_rows(base[name].T, 2).T)
        elif name == "decoder.embed_tokens.embedding":
            rows = np.asarray(value)
            np.testing.assert_array_equal(rows[:-2], base[name])
            np.testing.assert_allclose(rows[-1], base[name].mean(axis=0), atol=1e-6)
        elif name.startswith("decoder"):
            np.testing.assert_array_equal(np.asarray(value), base[name])


def test_rows_of_new_tokens_in_a_projector_file_are_used(folders: Path, tmp_path: Path):
    """`mm_use_im_start_end` trains two rows of the embedding along with the projector."""
    for name in ("base", "clip"):
        (tmp_path / name).symlink_to(folders / name)
    (tmp_path / "m").mkdir()
    keys = torch.load(folders / "projector" / "mm_projector.bin")
    rows = torch.arange(2.0 * TEXT.embed_dim).reshape(2, -1)
    torch.save(keys | {"model.embed_tokens.weight": rows}, tmp_path / "m" / "mm_projector.bin")
    (tmp_path / "m" / "config.json").write_text(json.dumps(original_config(mm_use_im_start_end=True)))
    found = open_checkpoint(str(tmp_path / "m"), base=str(tmp_path / "base"))
    assert (found.template, found.mm_use_im_start_end) == ("v1", True)
    np.testing.assert_array_equal(np.asarray(found.params["decoder.embed_tokens.embedding"])[-2:], rows.numpy())


def _frame(folder: Path) -> list[int]:
    """The tokens before and after a picture."""
    tokens = load(str(folder))[1].ask([Turn("user", "Which?")], [Image.new("RGB", (8, 8))]).tokens
    first, last = np.flatnonzero(tokens == IMAGE_TOKEN)[[0, -1]]
    return tokens[[first - 1, last + 1]].tolist()


@pytest.mark.parametrize("has_patch", [False, True], ids=["frames", "patch and frames"])
def test_a_framed_model_adds_its_tokens_to_the_tokenizer_of_a_base(
    folders: Path, data: Path, tmp_path: Path, has_patch: bool
):
    (tmp_path / "clip").symlink_to(folders / "clip")
    shutil.copytree(folders / "base", tmp_path / "base")
    shutil.copytree(data / "tokenizer", tmp_path / "base", dirs_exist_ok=True)
    config = original_config(mm_use_im_start_end=True, mm_use_im_patch_token=has_patch)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mm_projector.bin").symlink_to(folders / "projector" / "mm_projector.bin")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    first = open_tokenizer(str(data / "tokenizer")).vocab_size + has_patch
    for to in ("jax", "original"):
        convert(str(tmp_path / "m"), str(tmp_path / to), to=to, base=str(tmp_path / "base"))
        assert _frame(tmp_path / to) == [first, first + 1]
    convert(str(tmp_path / "m"), str(tmp_path / "hf"), to="hf", base=str(tmp_path / "base"))
    tokenizer = open_tokenizer(str(tmp_path / "hf"))
    assert [tokenizer.token_id(name) for name in (IM_START, IM_END, "<image>")] == [first, first + 1, first + 2]
    assert (tokenizer.token_id(IM_PATCH) == first - 1) == has_patch
    # A whole model, whose folder holds the base's tokenizer, is asked as it is.
    write_folder(tmp_path / "whole", config, load_file(folders / "target" / "model.safetensors"))
    shutil.copytree(data / "tokenizer", tmp_path / "whole", dirs_exist_ok=True)
    assert _frame(tmp_path / "whole") == [first, first + 1]


def test_a_base_of_another_shape_is_refused_by_field(folders: Path, tmp_path: Path):
    (tmp_path / "clip").symlink_to(folders / "clip")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mm_projector.bin").symlink_to(folders / "projector" / "mm_projector.bin")
    for change, message in (
        ({"rope_theta": 5e5}, "rope_theta is 10000.0, must be 500000.0"),
        ({"rms_norm_eps": 1e-6}, "eps"),
    ):
        (tmp_path / "m" / "config.json").write_text(json.dumps(original_config(**change)))
        with pytest.raises(CheckpointError, match=f"not the base that .* was trained on: .*{message}"):
            open_checkpoint(str(tmp_path / "m"), base=str(folders / "base"))
    (tmp_path / "m" / "config.json").write_text(json.dumps(original_config(vocab_size=99)))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has 318 tokens, more than the 99"):
        open_checkpoint(str(tmp_path / "m"), base=str(folders / "base"))


def _adapter(folder: Path, *, name: Callable[[str], str], config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    wide, out = TEXT.embed_dim, TEXT.num_heads * TEXT.head_dim
    pair = {
        "A": rng.standard_normal((RANK, wide)).astype(np.float32),
        "B": rng.standard_normal((out, RANK)).astype(np.float32),
    }
    folder.mkdir()
    save_file({name(side): value for side, value in pair.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"} | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return pair


ERAS = {
    "saved": "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight",
    "in memory": "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.default.weight",
    "transformers 4.51": "base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_{}.weight",
    "transformers 4.52": "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{}.weight",
}


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("is_scaled_by_root", [False, True], ids=["lora", "rslora"])
def test_an_adapter_is_merged_under_the_names_of_every_era(
    folders: Path, tmp_path: Path, era: str, is_scaled_by_root: bool
):
    for name in ("base", "clip", "hf"):
        (tmp_path / name).symlink_to(folders / name)
    on_llava = era.startswith("transformers")
    config = {} if on_llava else original_config(mm_projector_type="mlp2x_gelu")
    pair = _adapter(tmp_path / "m", name=ERAS[era].format, config=config, use_rslora=is_scaled_by_root)
    base = _open(folders / ("hf" if on_llava else "base"))
    target = _open(folders / "target")
    if not on_llava:
        # As train() of the original writes it: the wrappers of PEFT and of the model come on top.
        kept = torch.load(folders / "projector" / "mm_projector.bin")
        kept = {f"base_model.model.{key}": value for key, value in kept.items()}
        torch.save(kept, tmp_path / "m" / "non_lora_trainables.bin")
    found = _open(tmp_path / "m", folders / ("hf" if on_llava else "base"))
    scale = ALPHA / (RANK**0.5 if is_scaled_by_root else RANK)
    np.testing.assert_allclose(found[Q_PROJ], base[Q_PROJ] + scale * (pair["B"] @ pair["A"]).T, atol=1e-5)
    np.testing.assert_array_equal(found["decoder.norm.scale"], base["decoder.norm.scale"])
    np.testing.assert_array_equal(found["projector.linear.1.kernel"], target["projector.linear.1.kernel"])


def test_patterns_say_more_than_the_setting_that_they_are_for(folders: Path, tmp_path: Path):
    patterns = {"alpha_pattern": {"k_proj": 1, "^model.layers.1.self_attn.q_proj": 6}, "rank_pattern": {"q_proj": RANK}}
    pair = _adapter(tmp_path / "m", name=Q.format, config={}, r=64, **patterns)
    found, base = _open(tmp_path / "m", folders / "base"), _open(folders / "base")
    np.testing.assert_allclose(found[Q_PROJ], base[Q_PROJ] + 6 / RANK * (pair["B"] @ pair["A"]).T, atol=1e-5)


def test_a_trained_copy_wins_over_what_it_replaced_and_two_are_refused(folders: Path, tmp_path: Path):
    _adapter(tmp_path / "m", name=Q.format, config={})
    path, key = tmp_path / "m" / "adapter_model.safetensors", "base_model.model.lm_head{}.weight"
    rows = _open(folders / "base")["decoder.lm_head.kernel"].T
    copies = {key.format(".modules_to_save.default"): rows + 1, key.format(".original_module"): rows}
    save_file(load_file(path) | copies, path)
    np.testing.assert_array_equal(_open(tmp_path / "m", folders / "base")["decoder.lm_head.kernel"], (rows + 1).T)
    save_file(load_file(path) | {key.format(""): rows}, path)
    with pytest.raises(CheckpointError, match=r"lm_head.* means decoder\.lm_head\.kernel, as .* does"):
        _open(tmp_path / "m", folders / "base")


@pytest.mark.parametrize(
    ("key", "settings", "message"),
    [
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight", {"use_dora": True}, "use_dora=True"),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight", {"bias": "all"}, "bias='all'"),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight", {"peft_type": "IA3"}, "peft_type='IA3'"),
        ("base_model.model.model.layers.1.mlp.gate_proj.lora_{}.weight", {}, "gate_proj.*is .32, 48., .* needs"),
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_{}.weight", {}, r"has no decoder\.layers\.9"),
        ("base_model.model.transformer.h.1.attn.lora_{}.weight", {}, r"no rule knows base_model\.model\.transformer"),
        (Q, {"use_kasa": True}, "use_kasa=True"),
        (Q, {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        (Q, {"r": 64}, r"q_proj\.lora_A\.weight has the shape .3, 32.; .*adapter_config\.json says r=64"),
        (Q, {"rank_pattern": {"q_proj": 9}}, "says r=9"),
        (Q, {"lora_alpha": float("nan")}, "lora_alpha must be finite"),
        (Q, {"alpha_pattern": {"(a+)+q": 1}}, "alpha_pattern has .*it repeats a group"),
        (Q, {"alpha_pattern": {"(": 1}}, "alpha_pattern has"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_key(
    folders: Path, tmp_path: Path, key: str, settings: dict[str, Any], message: str
):
    _adapter(tmp_path / "m", name=key.format, config={}, **settings)
    with pytest.raises(CheckpointError, match=message):
        _open(tmp_path / "m", folders / "base")


def test_whole_numbers_are_no_factors(folders: Path, tmp_path: Path):
    pair = _adapter(tmp_path / "m", name=Q.format, config={})
    save_file(
        {Q.format(side): value.astype(np.int8) for side, value in pair.items()},
        tmp_path / "m" / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_[AB]\.weight \(int8\) is no factor of a matrix"):
        _open(tmp_path / "m", folders / "base")


def test_an_adapter_without_a_base_names_the_one_it_wants(folders: Path, tmp_path: Path):
    _adapter(tmp_path / "m", name=ERAS["saved"].format, config={}, base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    with pytest.raises(CheckpointError, match=r"adapter of 'lmsys/vicuna-7b-v1\.5'.*as --base"):
        _open(tmp_path / "m")
    save_file({ERAS["saved"].format("A"): np.ones((3, 32), np.float32)}, tmp_path / "m" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lora_A\.weight has no counterpart"):
        _open(tmp_path / "m", folders / "base")
