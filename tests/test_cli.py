"""The command line: quick help, every command parses, one clear line for every mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava_jax import cli
from llava_jax.cli import main

COMMANDS = {
    "quickstart": [],
    "train": ["--config", "c.py", "--workdir", "d"],
    "convert": ["s", "d", "--to", "hf"],
    "data check": ["--config", "c.py"],
    "plan": ["--config", "c.py", "--topology", "v5e:8x8"],
    "generate": ["--model", "m", "--prompt", "p"],
    "chat": ["--model", "m"],
    "score": ["--model", "m", "--prompt", "p", "--answer", "a"],
}


def test_help_and_the_package_import_nothing_heavy():
    code = (
        "import sys, llava_jax.cli; llava_jax.cli._parser().format_help(); "
        "print([m for m in ('jax', 'numpy', 'torch', 'transformers', 'grain', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses_and_has_a_function(command: str):
    arguments = cli._parser().parse_args([*command.split(), *COMMANDS[command]])
    assert callable(arguments.run)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: llava-jax" in capsys.readouterr().out


def test_pictures_are_several_and_may_be_repeated():
    words = ["generate", "--model", "m", "--prompt", "p", "--image", "a", "b", "--image", "c"]
    assert cli._parser().parse_args(words).image == ["a", "b", "c"]
    assert cli._parser().parse_args(["chat", "--model", "m"]).image == []


def test_overrides_may_be_repeated():
    words = ["train", "--config", "c", "--workdir", "d", "--set", "a=1", "--set", "b.c=2"]
    assert cli._parser().parse_args(words).set == ["a=1", "b.c=2"]


def test_sampling_is_greedy_unless_asked():
    arguments = cli._parser().parse_args(["generate", "--model", "m", "--prompt", "p"])
    assert (arguments.temperature, arguments.top_p, arguments.top_k, arguments.stop) == (0.0, 1.0, 0, [])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "--config, --workdir"),
        (["train", "--config", "c"], "--workdir"),
        (["train", "--config", "c", "--workdir", "d", "--sett", "x=1"], "--sett"),
        (["data"], "WHAT"),
        (["data", "mend"], "invalid choice"),
        (["generate", "--model", "m"], "--prompt"),
        (["generate", "--model", "m", "--prompt", "p", "--top-k", "many"], "invalid int value: 'many'"),
        (["generate", "--model", "m", "--prompt", "p", "--image"], "--image"),
        (["score", "--model", "m", "--prompt", "p"], "--answer"),
    ],
)
def test_wrong_usage_exits_with_2_and_names_the_argument(words: list[str], says: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--config", "none.py", "--workdir", "d"], "none.py"),
        (["data", "check", "--config", "none.py"], "none.py"),
        (["chat", "--model", "no_such_folder", "--conv", "raw"], "--conv raw"),
        (["generate", "--model", "m", "--prompt", "p", "--temperature", "-1"], "temperature"),
        (["generate", "--model", "m", "--prompt", "p", "--top-p", "2"], "top_p"),
        (["generate", "--model", "m", "--prompt", "p", "--max-new-tokens", "0"], "max_new_tokens"),
    ],
)
def test_a_users_mistake_is_one_line_and_exits_with_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("llava-jax: ")
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "words", [["generate", "--prompt", "p"], ["score", "--prompt", "p", "--answer", "a"], ["chat"]], ids=" ".join
)
def test_a_missing_model_is_one_line_and_exits_with_74(words: list[str], capsys: pytest.CaptureFixture):
    assert main([*words, "--model", "no_such_folder"]) == 74
    err = capsys.readouterr().err
    assert err.startswith("llava-jax: ")
    assert err.count("\n") == 1
    assert "no_such_folder" in err


def test_a_defect_exits_with_70(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The contract's code for internal errors, with the trace for the report."""
    config = tmp_path / "config.py"
    debug = Path(__file__).parents[1] / "configs" / "debug_cpu.py"
    config.write_text(
        "import llava_jax.data.check as check\nfrom llava_jax.train.config import load_config\n\n\n"
        f"def get_config():\n    check.ask_all = lambda *_, **__: 1 / 0\n    return load_config({str(debug)!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "llava_jax.cli", "data", "check", "--config", str(config)],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 70
    assert "ZeroDivisionError" in result.stderr
