"""Adapter folders: torch and PEFT open them and compute what we do."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from llava_jax.cli import main
from llava_jax.convert.card import ModelCard, read_card, write_card
from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.config_json import text_fields
from llava_jax.convert.layouts import from_huggingface, to_layout
from llava_jax.convert.lora_folder import write_adapter
from llava_jax.convert.tensor import in_memory
from llava_jax.convert.torch_zip import write_torch_zip
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import CheckpointError
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.lora import LoraConfig, is_adapter
from llava_jax.models.parameters import bind, part
from llava_jax.train.checkpoint import Checkpoints
from tests.convert.llavas import write_folder
from tests.models.oracle import error, llama_config, llava_config, state
from tests.models.oracle import make as make_reference
from tests.tiny import LLAVA

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.05)
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 9))


@pytest.fixture(scope="module")
def learned() -> dict[str, np.ndarray]:
    """Adapters and a projector as a run leaves them."""
    rng = np.random.default_rng(3)
    shapes = structure(LLAVA, lora=LORA)[1]
    names = [name for name in shapes if is_adapter(name) or part(name) == "projector"]
    return {name: (0.2 * rng.standard_normal(shapes[name].shape)).astype(np.float32) for name in names}


def write(folder: Path, learned: Mapping[str, np.ndarray], *, base: str, **names: Any) -> None:
    folder.mkdir()
    tensors = {name: in_memory(value, name) for name, value in learned.items()}
    write_adapter(folder, tensors, LORA, LLAVA, base=base, **names)


def ours(learned: dict[str, np.ndarray], reference: torch.nn.Module) -> np.ndarray:
    values = from_huggingface(state(reference))
    missing = {"tower", "projector", "decoder"} - {part(name) for name in values}
    values = random_parameters(LLAVA, missing, seed=0) | values | learned
    model = bind(
        structure(LLAVA, lora=LoraConfig(rank=4, alpha=8.0))[0], {n: jnp.asarray(v) for n, v in values.items()}
    )
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    return np.asarray(model.decoder(model.decoder.embed_tokens(TOKENS), positions) @ model.decoder.head())


def test_peft_opens_the_originals_names_on_a_llama(learned: dict[str, np.ndarray], tmp_path: Path):
    """As `load_pretrained_model` of the original does: the adapter on the language model, the rest by hand."""
    base = make_reference(transformers.LlamaForCausalLM, llama_config(LLAVA.text), seed=0)
    expected = ours(learned, base)
    write(tmp_path / "lora", learned, base="vicuna")
    model = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    with torch.no_grad():
        assert error(model(torch.tensor(TOKENS)).logits.numpy(), expected) < 1e-5
        merged = model.merge_and_unload()
        assert error(merged(torch.tensor(TOKENS)).logits.numpy(), expected) < 1e-5
    beside = torch.load(tmp_path / "lora" / "non_lora_trainables.bin", map_location="cpu", weights_only=True)
    # What the loader strips: `base_model.`, then one `model.`.
    stripped = {name.removeprefix("base_model.").removeprefix("model."): value for name, value in beside.items()}
    assert set(stripped) == {f"model.mm_projector.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    for number, module in ((0, 0), (1, 2)):
        weight = stripped[f"model.mm_projector.{module}.weight"].numpy()
        np.testing.assert_array_equal(weight, learned[f"projector.linear.{number}.kernel"].T)


def test_peft_opens_the_names_of_transformers_on_a_llava(learned: dict[str, np.ndarray], tmp_path: Path):
    base = make_reference(transformers.LlavaForConditionalGeneration, llava_config(LLAVA), seed=0)
    expected = ours(learned, base)
    write(tmp_path / "lora", learned, base="llava", names="hf")
    with pytest.MonkeyPatch.context() as patch:
        # A key that PEFT does not know is a warning there; here it fails.
        import warnings

        patch.setattr(warnings, "warn", _refuse(warnings.warn))
        model = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    with torch.no_grad():
        found = model(torch.tensor(TOKENS)).logits.numpy()
    assert error(found, expected) < 1e-5
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    (kernel,) = [v for n, v in weights.items() if "modules_to_save" in n and n.endswith("linear_2.weight")]
    np.testing.assert_array_equal(kernel, learned["projector.linear.1.kernel"].T)
    assert not any("lora_" in name and "vision" in name for name in weights)


def _refuse(warn):
    def check(message, *arguments, **settings):
        assert "missing" not in str(message).lower(), message
        assert "unexpected" not in str(message).lower(), message
        return warn(message, *arguments, **settings)

    return check


def test_the_names_before_transformers_4_52(learned: dict[str, np.ndarray], tmp_path: Path):
    from safetensors.numpy import load_file

    write(tmp_path / "lora", learned, base="llava", names="hf-4.51")
    names = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert "base_model.model.multi_modal_projector.linear_1.bias" in names
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_torch_reads_the_archive_that_we_write(dtype, tmp_path: Path):
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b.weight": (300, 7, 2), "one": (1,), "ü": (70_000,)}
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    write_torch_zip(tmp_path / "x.bin", arrays)
    found = torch.load(tmp_path / "x.bin", weights_only=True)
    assert found.keys() == arrays.keys()
    for name, value in arrays.items():
        assert found[name].is_contiguous()
        np.testing.assert_array_equal(found[name].float().numpy(), value.astype(np.float32))
        assert str(found[name].dtype) == f"torch.{np.dtype(dtype).name}"


def test_what_peft_has_no_place_for_is_refused(learned: dict[str, np.ndarray], tmp_path: Path):
    with pytest.raises(CheckpointError, match="Only a run with adapters"):
        write(tmp_path / "x", {"projector.linear.0.bias": np.zeros(3, np.float32)}, base="b")
    newline = {"image_newline": np.zeros(LLAVA.text.embed_dim, np.float32)}
    with pytest.raises(CheckpointError, match="keeps a projector alone; image_newline was trained"):
        write(tmp_path / "y", learned | newline, base="b", names="hf")


OLDER, NEWEST = 3, 7


@pytest.fixture(scope="module")
def folders(learned: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` (a Llama), `llava` (transformers' LLaVA on it), and `run`, which trained adapters on it twice as long."""
    root = tmp_path_factory.mktemp("adapters")
    torch_llava = make_reference(transformers.LlavaForConditionalGeneration, llava_config(LLAVA), seed=0)
    torch_llava.save_pretrained(root / "llava")
    values = from_huggingface(state(torch_llava))
    base = {name: in_memory(value, name) for name, value in values.items() if part(name) == "decoder"}
    tensors = {key: tensor.view() for key, tensor in to_layout(base, "original", LLAVA).items()}
    write_folder(root / "base", text_fields(LLAVA.text), tensors)
    make_run(root / "run", values, learned, decoder=str(root / "base"))
    return root


def make_run(folder: Path, values: Mapping[str, np.ndarray], learned: Mapping[str, np.ndarray], *, decoder: str):
    """A workdir as a run leaves it: its frozen parts, and two steps."""
    folder.mkdir()
    checkpoints = Checkpoints(str(folder))
    frozen = {name: jnp.asarray(value) for name, value in values.items() if name not in learned}
    checkpoints.save_frozen(frozen)
    for step in (OLDER, NEWEST):
        trained = {name: jnp.asarray(value) * (step / NEWEST) for name, value in learned.items()}
        checkpoints.save(step, trained, {"count": jnp.zeros((), jnp.int32)}, {"step": step})
        checkpoints.wait()
    checkpoints.close()
    write_card(folder, ModelCard(model=LLAVA, template="v1", image_mode="pad", label="trained"))
    lora = {f"lora.{name}": value for name, value in dataclasses.asdict(LORA).items()}
    init = {"init.tower": "random", "init.projector": "random", "init.decoder": decoder}
    (folder / "config.json").write_text(json.dumps(lora | init))


def run(*words: Any) -> int:
    return main(["convert", *map(str, words)])


def plain(folder: Path, **settings: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in open_checkpoint(str(folder), **settings).params.items()}


class OriginalsLlama(transformers.LlamaForCausalLM):
    """What `LlavaLlamaForCausalLM` has where it looks for adapters and projector; its tower comes later."""

    def __init__(self, config: Any):
        super().__init__(config)
        wide = LLAVA.text.embed_dim
        layers = torch.nn.Linear(config.mm_hidden_size, wide), torch.nn.GELU(), torch.nn.Linear(wide, wide)
        self.model.mm_projector = torch.nn.Sequential(*layers)


def test_the_originals_way_to_open_an_adapter_gives_the_merged_model(folders: Path, tmp_path: Path, capsys):
    """`load_pretrained_model` with "lora" in the folder's name, step by step."""
    folder = tmp_path / "llava-lora"
    assert run(folders / "run", folder, "--to", "lora") == 0
    told = capsys.readouterr().out
    assert f"at step {NEWEST}" in told
    assert f"base {folders / 'base'}" in told
    fields = json.loads((folder / "config.json").read_text())
    assert (fields["model_type"], fields["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert fields["mm_vision_tower"] == str(folder / "vision_tower")
    assert not fields["unfreeze_mm_vision_tower"]
    config = transformers.LlamaConfig(**{k: v for k, v in fields.items() if k not in ("model_type", "torch_dtype")})
    model, info = OriginalsLlama.from_pretrained(folders / "base", config=config, output_loading_info=True)
    assert all("mm_projector" in key for key in info["missing_keys"])
    assert not info["unexpected_keys"]
    beside = torch.load(folder / "non_lora_trainables.bin", map_location="cpu")
    beside = {(k[11:] if k.startswith("base_model.") else k): v for k, v in beside.items()}
    if any(k.startswith("model.model.") for k in beside):
        beside = {(k[6:] if k.startswith("model.") else k): v for k, v in beside.items()}
    found = model.load_state_dict(beside, strict=False)
    assert not found.unexpected_keys
    assert not any("mm_projector" in key for key in found.missing_keys)
    opened: Any = PeftModel.from_pretrained(model, str(folder))
    assert sum("lora_A" in name for name, _ in opened.named_parameters()) == 7 * LLAVA.text.num_layers
    whole = opened.merge_and_unload().eval()
    merged = plain(folders / "run")
    theirs = from_huggingface(state(whole))
    assert set(theirs) == {name for name in merged if part(name) != "tower"}
    for name, value in theirs.items():
        np.testing.assert_allclose(value, merged[name], atol=1e-6, err_msg=name)
    tower = transformers.CLIPVisionModel.from_pretrained(fields["mm_vision_tower"])
    assert sum(value.numel() for value in tower.parameters()) == sum(
        value.size for name, value in merged.items() if part(name) == "tower"
    )
    # And ours, on the same base.
    again = plain(folder, base=str(folders / "base"))
    assert set(again) == set(merged)
    for name, value in merged.items():
        np.testing.assert_allclose(again[name], value, atol=1e-6, err_msg=name)


def test_peft_opens_a_runs_adapters_on_a_llava_of_transformers(folders: Path, tmp_path: Path):
    folder = tmp_path / "out"
    assert run(folders / "run", folder, "--to", "lora-hf", "--base", folders / "llava", "--step", OLDER) == 0
    base = transformers.LlavaForConditionalGeneration.from_pretrained(folders / "llava")
    opened: Any = PeftModel.from_pretrained(base, str(folder))
    theirs, merged = from_huggingface(state(opened.merge_and_unload())), plain(folders / "run", step=OLDER)
    assert set(theirs) == set(merged)
    for name, value in theirs.items():
        np.testing.assert_allclose(value, merged[name], atol=1e-6, err_msg=name)
    name = "decoder.layers.1.mlp.up_proj.kernel"
    assert not np.allclose(merged[name], plain(folders / "run")[name], atol=1e-3)


def test_adapters_remember_a_template_that_their_base_has_not(folders: Path, tmp_path: Path, capsys):
    """Their layouts cannot say it: a config like this one means v1, a base without a chat template none."""
    shutil.copytree(folders / "run", tmp_path / "run")
    card = read_card(tmp_path / "run")
    for name, template in (("lora", "v0"), ("lora", "v1"), ("lora-hf", "v0")):
        write_card(tmp_path / "run", dataclasses.replace(card, template=template))
        base = folders / ("llava" if name == "lora-hf" else "base")
        assert run(tmp_path / "run", tmp_path / "out", "--to", name, "--base", base) == 0
        assert ("cannot say template v0; elsewhere give --conv v0" in capsys.readouterr().out) == (template == "v0")
        assert open_checkpoint(str(tmp_path / "out"), base=str(base)).template == template


@pytest.mark.parametrize("names", [("<im_start>", "<im_end>"), ("<im_patch>", "<im_start>", "<im_end>")])
def test_adapters_of_framed_pictures_number_the_frames_as_the_run_did(
    folders: Path, data: Path, tmp_path: Path, names: tuple[str, ...]
):
    """Whoever opens them adds these tokens to the base's."""
    shutil.copytree(folders / "run", tmp_path / "run")
    write_card(tmp_path / "run", dataclasses.replace(read_card(tmp_path / "run"), mm_use_im_start_end=True))
    open_tokenizer(str(data / "tokenizer"), names).save(tmp_path / "run" / "tokenizer")
    shutil.copytree(folders / "base", tmp_path / "base")
    shutil.copytree(data / "tokenizer", tmp_path / "base", dirs_exist_ok=True)
    assert run(tmp_path / "run", tmp_path / "out", "--to", "lora", "--base", tmp_path / "base") == 0
    found = open_checkpoint(str(tmp_path / "out"), base=str(tmp_path / "base"))
    assert (found.tokenizer, found.added_tokens) == (tmp_path / "base", names)


def test_any_step_is_exported_and_another_is_refused(folders: Path, tmp_path: Path, capsys):
    assert run(folders / "run", tmp_path / "a", "--to", "hf", "--step", OLDER) == 0
    assert f"training workdir at step {OLDER}" in capsys.readouterr().out
    found, wanted = plain(tmp_path / "a"), plain(folders / "run", step=OLDER)
    np.testing.assert_array_equal(found["projector.linear.0.kernel"], wanted["projector.linear.0.kernel"])
    for source, says in ((folders / "run", f"the steps {OLDER}, {NEWEST}; got 4"), (tmp_path / "a", "--step is for")):
        assert run(source, tmp_path / "b", "--to", "hf", "--step", "4") == 74
        assert says in capsys.readouterr().err
        assert not (tmp_path / "b").exists()


def test_a_base_with_fewer_tokens_gets_the_rows_of_the_run(
    folders: Path, learned: dict[str, np.ndarray], tmp_path: Path
):
    """The original makes both anew, empty, where the config has more tokens: they must come with the adapter."""
    tensors = {key: value.copy() for key, value in state_of(folders / "base").items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[key] = tensors[key][:-2]
    text = dataclasses.replace(LLAVA.text, vocab_size=LLAVA.text.vocab_size - 2)
    write_folder(tmp_path / "small", text_fields(text), tensors)
    assert run(folders / "run", tmp_path / "out", "--to", "lora", "--base", tmp_path / "small") == 0
    beside = torch.load(tmp_path / "out" / "non_lora_trainables.bin")
    assert beside["base_model.model.lm_head.weight"].shape == (LLAVA.text.vocab_size, LLAVA.text.embed_dim)
    again, merged = plain(tmp_path / "out", base=str(tmp_path / "small")), plain(folders / "run")
    for name in ("decoder.embed_tokens.embedding", "decoder.lm_head.kernel"):
        np.testing.assert_array_equal(again[name], merged[name])


def state_of(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def test_what_is_not_the_base_of_a_run_is_refused(
    folders: Path, learned: dict[str, np.ndarray], tmp_path: Path, capsys
):
    tensors = state_of(folders / "base")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.01
    write_folder(tmp_path / "other", text_fields(LLAVA.text), tensors)
    thin = dataclasses.replace(LLAVA.text, rope_theta=5e5)
    write_folder(tmp_path / "theta", text_fields(thin), state_of(folders / "base"))
    make_run(tmp_path / "unknown", plain(folders / "llava"), learned, decoder="random")
    for source, words, code, says in (
        (folders / "run", ["lora", "--base", tmp_path / "other"], 74, "model.norm.weight differs"),
        (folders / "run", ["lora", "--base", tmp_path / "theta"], 74, "rope_theta is 500000.0, must be 10000.0"),
        (folders / "run", ["lora", "--base", folders / "run/frozen"], 74, "frozen"),
        (folders / "run", ["lora-hf"], 74, "a LLaVA of transformers"),
        (folders / "llava", ["lora"], 74, "Only a run with adapters"),
        (tmp_path / "unknown", ["lora"], 2, "says init.decoder='random'. Give that model as --base"),
    ):
        assert run(source, tmp_path / "out", "--to", *words) == code
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
        assert not (tmp_path / "out").exists()
