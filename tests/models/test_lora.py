"""Adapters against PEFT on torch, in both forms of the layers; what they add, drop and merge into."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig as PeftConfig
from peft import get_peft_model

from llava_jax.models.build import random_parameters, structure
from llava_jax.models.lora import DROPOUT, LoraConfig, dropout_keys, initial_factor, is_adapter, merged
from llava_jax.models.parameters import bind, part, stack_layers, unstack_layers
from tests.models.oracle import error, llama_config, state
from tests.models.oracle import make as make_reference
from tests.tiny import LLAVA as TINY

# Fewer layers: compiling is most of what these tests cost.
LLAVA = dataclasses.replace(
    TINY,
    vision=dataclasses.replace(TINY.vision, num_layers=1),
    text=dataclasses.replace(TINY.text, num_layers=2),
)
LORA = LoraConfig(rank=4, alpha=8.0)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = np.random.default_rng(0).integers(0, LLAVA.text.vocab_size, (2, 11))


@functools.cache
def reference(dtype: torch.dtype = torch.float32):
    """A Llama with PEFT's adapters as `get_peft_model` of the original's train() makes them, B random too."""
    base = make_reference(transformers.LlamaForCausalLM, llama_config(LLAVA.text), seed=0)
    config = PeftConfig(
        r=LORA.rank, lora_alpha=LORA.alpha, target_modules=LINEAR, lora_dropout=0.05, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return model


def ours(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PEFT's state dict of a Llama under our names."""
    values = {}
    for name, value in tensors.items():
        name = name.removeprefix("base_model.model.").removeprefix("model.").replace(".base_layer", "")
        name = name.replace(".default", "").replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
        if name.startswith("embed_tokens"):
            name = "embed_tokens.embedding"
        elif value.ndim == 1:
            name = name.replace(".weight", ".scale")
        else:
            name, value = name.replace(".weight", ".kernel"), value.T
        values[f"decoder.{name}"] = np.ascontiguousarray(value)
    return values


@functools.cache
def everything() -> dict[str, np.ndarray]:
    return random_parameters(LLAVA, ("tower", "projector"), seed=0) | ours(state(reference()))


def logits(values, *, stacked: bool, lora: LoraConfig | None = LORA):
    values = {name: jnp.asarray(value) for name, value in values.items()}
    model = bind(structure(LLAVA, stacked=stacked, lora=lora)[0], stack_layers(values) if stacked else values)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    return model.decoder(model.decoder.embed_tokens(jnp.asarray(TOKENS)), positions) @ model.decoder.head()


def test_every_linear_layer_of_the_decoder_but_the_head_has_an_adapter():
    adapted = {name.rpartition(".")[0] for name in structure(LLAVA, lora=LORA)[1] if is_adapter(name)}
    layers = range(LLAVA.text.num_layers)
    blocks = {"self_attn": LINEAR[:4], "mlp": LINEAR[4:]}
    assert adapted == {f"decoder.layers.{i}.{b}.{n}" for i in layers for b, names in blocks.items() for n in names}


def test_names_and_shapes_are_those_of_peft():
    expected = {name: value.shape for name, value in everything().items()}
    assert {name: value.shape for name, value in structure(LLAVA, lora=LORA)[1].items()} == expected


@pytest.mark.parametrize("stacked", [False, True])
def test_logits_are_those_of_peft(stacked: bool):
    with torch.no_grad():
        expected = reference()(torch.tensor(TOKENS)).logits.numpy()
    assert error(logits(everything(), stacked=stacked), expected) < 1e-5
    # And the adapters matter: without them the reference is somewhere else.
    plain = {name: value for name, value in everything().items() if not is_adapter(name)}
    assert error(logits(plain, stacked=stacked, lora=None), expected) > 1e-2


@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_of_the_factors_are_those_of_peft(stacked: bool):
    weights = np.random.default_rng(1).standard_normal((*TOKENS.shape, LLAVA.text.vocab_size)).astype(np.float32)
    model = reference()
    model.zero_grad()
    (model(torch.tensor(TOKENS)).logits * torch.tensor(weights)).sum().backward()
    found = {name: value.grad.numpy() for name, value in model.named_parameters() if value.grad is not None}
    expected = ours(found)
    assert all(map(is_adapter, expected))

    frozen = {name: value for name, value in everything().items() if not is_adapter(name)}
    adapters = {name: value for name, value in everything().items() if is_adapter(name)}
    gradients = jax.grad(lambda a: (logits(frozen | a, stacked=stacked) * weights).sum())(adapters)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert error(gradient, expected[name]) < 2e-5, name


def test_merged_weights_are_those_of_peft():
    expected = ours({k: v.numpy() for k, v in _merged_by_peft().items()})
    values = merged(everything(), LORA.scale)
    for name, value in expected.items():
        assert error(values[name], value) < 1e-6, name
    assert not any(map(is_adapter, values))
    np.testing.assert_allclose(logits(values, stacked=False, lora=None), logits(everything(), stacked=False), atol=2e-5)


def _merged_by_peft() -> dict[str, torch.Tensor]:
    import copy

    return copy.deepcopy(reference()).merge_and_unload().state_dict()


def test_a_merge_in_bfloat16_rounds_once():
    values = {name: np.asarray(jnp.asarray(value, jnp.bfloat16)) for name, value in everything().items()}
    after = merged(values, LORA.scale)
    exact = merged({name: value.astype(np.float32) for name, value in values.items()}, LORA.scale)
    for name, value in after.items():
        assert value.dtype == values[name].dtype
        np.testing.assert_array_equal(value, exact[name].astype(value.dtype), err_msg=name)


def test_a_fresh_adapter_adds_nothing_and_starts_in_the_range_of_peft():
    rng = np.random.default_rng(0)
    a, b = (initial_factor(f"x.lora_{c}", shape, rng) for c, shape in (("a", (400, 50)), ("b", (50, 300))))
    assert not b.any()
    fresh = torch.nn.Linear(400, 50, bias=False)
    torch.nn.init.kaiming_uniform_(fresh.weight, a=5**0.5)
    assert abs(np.abs(a).max() / fresh.weight.abs().max().item() - 1) < 0.01
    assert abs(a.std() / fresh.weight.std().item() - 1) < 0.02


DROPPING = dataclasses.replace(LORA, dropout=0.25)


@pytest.mark.parametrize("stacked", [False, True])
def test_dropout_leaves_out_its_share_and_keeps_the_mean(stacked: bool):
    """The output is linear in what one last adapter is given, so its mean over masks is that without dropout."""
    graphdef, bound = structure(LLAVA, stacked=stacked, lora=DROPPING)
    values = {name: jnp.asarray(value) for name, value in everything().items()}
    last = f"decoder.layers.{LLAVA.text.num_layers - 1}.mlp.down_proj.lora_b"
    values = {n: jnp.zeros_like(v) if n.endswith(".lora_b") and n != last else v for n, v in values.items()}
    held = stack_layers(values) if stacked else values
    x = jax.random.normal(jax.random.key(0), (2, 5, LLAVA.text.embed_dim))
    norm = jnp.broadcast_to(jnp.arange(5), (2, 5))

    @jax.jit
    def hidden(key):
        model = bind(graphdef, held | dropout_keys(bound, key))
        # Before the final norm, which is not linear.
        model.decoder.norm = lambda x: x
        return model.decoder(x, norm)

    still = bind(structure(LLAVA, stacked=stacked, lora=LORA)[0], held)
    still.decoder.norm = lambda x: x
    expected = still.decoder(x, norm)
    runs = jnp.stack([hidden(jax.random.key(i)) for i in range(300)])
    spread = float(runs.std(0).max())
    assert spread > 0
    assert float(jnp.abs(runs.mean(0) - expected).max()) < 6 * spread / 300**0.5
    np.testing.assert_array_equal(runs[0], hidden(jax.random.key(0)))


def test_every_layer_drops_something_else():
    _, bound = structure(LLAVA, stacked=True, lora=DROPPING)
    keys = dropout_keys(bound, jax.random.key(0))
    assert {name.rpartition(".")[0] for name in keys} == {
        name.rpartition(".")[0] for name in bound if name.endswith(".lora_a")
    }
    flat = np.concatenate([np.asarray(value) for value in keys.values()])
    assert len(np.unique(flat, axis=0)) == len(flat) == 7 * LLAVA.text.num_layers


def test_stacking_and_its_inverse_keep_adapters():
    values = {name: jnp.asarray(value) for name, value in everything().items() if part(name) == "decoder"}
    back = unstack_layers(stack_layers(values))
    assert back.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, "lora.rank must be at least 1; got 0"),
        ({"rank": 1, "alpha": 0.0}, "lora.alpha must be more than 0"),
        ({"rank": 1, "alpha": 1.0, "dropout": 1.0}, "lora.dropout must be at least 0 and less than 1; got 1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_a_model_without_dropout_has_no_keys():
    assert not any(name.endswith(DROPOUT) for name in structure(LLAVA, lora=LORA)[1])
