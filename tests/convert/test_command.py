"""`llava-jax convert`: what people see of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax.cli import main
from tests.convert.llavas import make_huggingface


def test_a_conversion_is_told_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_huggingface(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "jax"), "--to", "jax"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{tmp_path / 'hf'}: Hugging Face llava -> {tmp_path / 'jax'}: jax"
    tensors = len(json.loads((tmp_path / "jax" / "provenance.json").read_text())["sha256"])
    assert tensors == 3
    assert "float32" in told[1]
    assert "decoder" in told[2]
    assert "tower" in told[2]
    assert "template: not known, give --conv; pictures: square; tokenizer: none found" in told[3]


def test_a_refusal_is_one_line_without_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make_huggingface(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "jax"), "--to", "jax"]) == 74
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.strip().splitlines()) == 1
    assert "model.safetensors" in told.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_nothing_of_torch_or_transformers_is_imported_and_no_thread_is_left(tmp_path: Path):
    make_huggingface(tmp_path / "hf")
    code = (
        "import sys, threading; from llava_jax.cli import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)), "
        "threading.active_count())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "convert", str(tmp_path / "hf"), str(tmp_path / "out"), "--to", "hf"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.stdout.splitlines()[-1] == "0 [] 1", run.stderr
