"""Published sizes: names and shapes without weights, and memory with four gigabytes of them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from llava_jax.convert.checkpoint import Checkpoint
from llava_jax.convert.config_json import SpecialTokens
from llava_jax.convert.export import describe_huggingface
from llava_jax.convert.tensor import Tensor
from llava_jax.data.anyres import AnyRes
from llava_jax.models.build import structure
from llava_jax.shapes import LlavaConfig
from llava_jax.sizes import LLAVA_15_7B, LLAVA_15_13B, VICUNA_7B

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MISTRAL = dataclasses.replace(
    VICUNA_7B, hidden_dim=14_336, num_kv_heads=8, rope_theta=1e6, max_positions=32_768, vocab_size=32_000
)
# Nous-Hermes-2-Yi-34B.
YI = dataclasses.replace(
    VICUNA_7B,
    vocab_size=64_000,
    num_layers=60,
    embed_dim=7168,
    hidden_dim=20_480,
    num_heads=56,
    num_kv_heads=8,
    rope_theta=5e6,
)
SIZES = {
    "1.5 7B": (LLAVA_15_7B, 7_063_427_072),
    "1.5 13B": (LLAVA_15_13B, 13_351_494_656),
    "1.6 Mistral 7B": (dataclasses.replace(LLAVA_15_7B, text=MISTRAL, image_newline=True), 7_566_747_648),
    "1.6 34B": (dataclasses.replace(LLAVA_15_7B, text=YI, image_newline=True), 34_752_083_968),
}


@pytest.mark.parametrize("name", SIZES)
def test_an_export_has_the_names_shapes_and_dtypes_of_the_reference(name: str):
    model, count = SIZES[name]
    tensors, config = describe_huggingface(_abstract(model))[:2]
    cls: Any = transformers.LlavaNextForConditionalGeneration if model.image_newline else None
    cls = cls or transformers.LlavaForConditionalGeneration
    settings = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        theirs = cls._from_config(settings, dtype=torch.bfloat16)
    wanted = {_saved(key): (tuple(v.shape), "bfloat16") for key, v in theirs.state_dict().items()}
    assert {str(v.dtype) for v in theirs.state_dict().values()} == {"torch.bfloat16"}
    assert {key: (tensor.shape, str(tensor.dtype)) for key, tensor in tensors.items()} == wanted
    assert sum(tensor.size for tensor in tensors.values()) == sum(v.numel() for v in theirs.parameters()) == count


def _saved(key: str) -> str:
    """A key of version 5's memory as the hub has it."""
    for memory, disk in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if key.startswith(memory):
            return key.replace(memory, disk, 1)
    raise AssertionError(key)


def _abstract(model: LlavaConfig) -> Checkpoint:
    """A checkpoint of the original's without a byte of weights."""

    def never() -> np.ndarray:
        raise AssertionError("no weights here")

    dtype = np.dtype(ml_dtypes.bfloat16)
    params = {
        name: Tensor(shape=tuple(value.shape), dtype=dtype, origin=name, view=never)
        for name, value in structure(model)[1].items()
    }
    mode: Any = AnyRes(pinpoints=PINPOINTS, merge="spatial_unpad", rounding="original")
    return Checkpoint(
        model=model,
        params=params,
        layout="LLaVA's own",
        image_mode=mode if model.image_newline else "pad",
        tokens=SpecialTokens(bos_id=1, eos_id=2),
    )


_MEASURE = """
import resource, sys
from llava_jax.cli import main
import jax, optax, flax.nnx
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["convert", sys.argv[1], sys.argv[2], "--to", sys.argv[3]]) == 0
with open("/proc/self/status") as status:
    high = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(before, high)
"""


@pytest.mark.nightly
def test_converting_four_gigabytes_stays_within_two_tensors_and_a_gigabyte(tmp_path: Path):
    text = dataclasses.replace(VICUNA_7B, num_layers=8, vocab_size=32_064)
    model = dataclasses.replace(LLAVA_15_7B, text=text)
    checkpoint = dataclasses.replace(_abstract(model), tokens=SpecialTokens(bos_id=1, eos_id=2, image_id=32_000))
    tensors, config = describe_huggingface(checkpoint)[:2]
    rng = np.random.default_rng(0)

    def drawn(tensor: Tensor) -> Tensor:
        return dataclasses.replace(
            tensor, view=lambda: rng.integers(0, 2**14, tensor.shape, np.uint16).view(ml_dtypes.bfloat16)
        )

    from llava_jax.convert.folder import write_weights

    source = tmp_path / "source"
    source.mkdir()
    write_weights(source, {key: drawn(tensor) for key, tensor in tensors.items()}, shard_bytes=2_000_000_000)
    (source / "config.json").write_text(json.dumps(config))
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert total >= 4e9
    largest = max(tensor.nbytes for tensor in tensors.values())
    for before, after, to in (("source", "jax", "jax"), ("jax", "hf", "hf")):
        run = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(tmp_path / before), str(tmp_path / after), to],
            capture_output=True,
            text=True,
            check=True,
        )
        high = int(run.stdout.split()[-1]) * 1024
        print(f"{to}: {total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, VmHWM {high / 1e6:.0f} MB")
        assert high <= 2 * largest + 2**30
    first = {path.name: path for path in source.glob("*.safetensors")}
    assert first
    for path in (tmp_path / "hf").glob("*.safetensors"):
        assert path.stat().st_size > 0
