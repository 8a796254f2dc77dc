"""Adapter folders: torch and PEFT open them and compute what we do."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from llava_jax.convert.lora_folder import write_lora_folder
from llava_jax.convert.torch_zip import write_torch_zip
from llava_jax.errors import UserError
from llava_jax.models.build import random_parameters, structure
from llava_jax.models.lora import LoraConfig, is_adapter
from llava_jax.models.parameters import bind, part
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


def ours(learned: dict[str, np.ndarray], reference: torch.nn.Module) -> np.ndarray:
    from llava_jax.convert.layouts import from_huggingface

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
    write_lora_folder(str(tmp_path / "lora"), learned, LORA, base="vicuna")
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
    write_lora_folder(str(tmp_path / "lora"), learned, LORA, base="llava", names="hf")
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

    write_lora_folder(str(tmp_path / "lora"), learned, LORA, base="llava", names="hf-4.51")
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


def test_a_model_without_adapters_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="Only a run with adapters"):
        write_lora_folder(str(tmp_path / "x"), {"projector.linear.0.bias": np.zeros(3, np.float32)}, LORA, base="b")


def test_a_folder_that_holds_something_is_refused(learned: dict[str, np.ndarray], tmp_path: Path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="empty folder"):
        write_lora_folder(str(tmp_path), learned, LORA, base="b")
