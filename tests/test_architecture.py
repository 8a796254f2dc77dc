"""The shape of the code itself: imports point down, starting is quick, and every config runs as it says."""

import ast
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_jax.cli import _parser
from llava_jax.train.config import TrainConfig, load_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llava_jax"
# Each room imports from itself and from rooms of a lower number. `models` and `data` do not know each other.
LEVELS = {
    "errors": 0,
    "heap": 0,
    "shapes": 0,
    "chips": 0,
    "collectives": 0,
    "compiler": 0,
    "sizes": 1,
    "models": 1,
    "data": 1,
    "convert": 2,
    "drawing": 3,
    "train": 3,
    "inference": 3,
    "footprint": 4,
    "targets": 4,
    "quickstart": 4,
    "plan": 5,
    "cli": 6,
}
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, inside functions too; types alone do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_a_level():
    assert {_room(path) for path in MODULES} <= set(LEVELS)


def test_imports_point_down():
    upward = []
    for path in MODULES:
        room = _room(path)
        for line, name in _imports(path):
            words = name.split(".")
            if words[0] != "llava_jax":
                continue
            # The package itself stands for its public names, which come from `inference` and below.
            target = words[1] if len(words) > 1 else "inference"
            if target != room and LEVELS[target] >= LEVELS[room]:
                upward.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not upward, "\n".join(upward)


def test_nothing_imports_what_lies_outside_the_package():
    outside = {"configs", "scripts", "tests", "benchmarks", "torch", "tensorflow", "transformers"}
    for path in MODULES:
        for line, name in _imports(path):
            assert name.split(".")[0] not in outside, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_data_imports_no_jax_and_models_know_no_mesh():
    for path in MODULES:
        for line, name in _imports(path):
            where = f"{path.relative_to(ROOT)}:{line} imports {name}"
            if _room(path) == "data":
                assert name.split(".")[0] not in ("jax", "flax", "optax", "orbax"), where
            if _room(path) == "models":
                assert "sharding" not in name, where
                assert "Mesh" not in name, where


def test_modules_are_nouns_and_can_be_read_in_one_sitting():
    for path in MODULES:
        assert path.stem not in ("utils", "util", "common", "helpers", "helper", "base", "misc")
        assert path.stem not in sys.stdlib_module_names or path.stem == "__init__", f"{path} hides the standard library"
        assert len(path.read_text().splitlines()) <= 400, path


def test_every_module_says_what_it_is_for():
    for path in MODULES:
        assert path.stem == "__init__" or ast.get_docstring(ast.parse(path.read_text())), path


def test_no_annotation_is_a_string_by_decree():
    """jaxtyping skips the fields of dataclasses whose annotations are strings, in silence."""
    for path in MODULES:
        assert "__future__.annotations" not in {name for _, name in _imports(path)}, path


def test_no_environment_variable_is_a_setting_of_ours():
    """`LLAVA_JAX_HEAP` is none: the process marks with it that it was started again, see heap.py."""
    for path in MODULES:
        assert set(re.findall(r"LLAVA_JAX_\w+", path.read_text())) <= {"LLAVA_JAX_HEAP"}, path


def test_every_public_name_is_where_the_package_says():
    import llava_jax

    for name in llava_jax.__all__:
        assert getattr(llava_jax, name).__module__ == llava_jax._HOMES[name]
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = llava_jax.nothing


def _seconds(*command: str, runs: int = 3) -> tuple[float, str]:
    """The best of up to `runs` runs in fresh processes, and what the last one printed."""
    best = float("inf")
    for _ in range(runs):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        best = min(best, time.perf_counter() - start)
        if best < 0.2:
            break
    return best, done.stdout


def test_importing_the_package_is_quick_and_pulls_nothing_heavy():
    heavy = "('torch', 'transformers', 'jax', 'flax', 'orbax', 'grain', 'tensorflow', 'numpy')"
    seconds, printed = _seconds("-c", f"import sys, llava_jax; print([m for m in {heavy} if m in sys.modules])")
    assert printed.strip() == "[]"
    assert seconds < 0.5


def test_help_is_quick_and_names_every_command():
    seconds, printed = _seconds("-m", "llava_jax.cli", "--help")
    for command in ("quickstart", "train", "convert", "data", "plan", "generate", "chat", "score"):
        assert command in printed
    assert seconds < 1


def test_answering_pulls_neither_torch_nor_transformers():
    modules = "llava_jax.inference.generate, llava_jax.inference.score, llava_jax.train.loop, llava_jax.convert.folder"
    _, printed = _seconds(
        "-c", f"import sys, {modules}; print([m for m in ('torch', 'transformers') if m in sys.modules])", runs=1
    )
    assert printed.strip() == "[]"


def test_there_are_configs():
    assert {"debug_cpu", "quickstart_tower", "quickstart_align", "quickstart_tune"} <= {c.stem for c in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_says_its_command_and_loads(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    text = docstring.replace("\\\n", " ")
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("llava-jax ")]
    assert commands, f"{path} does not say how it is launched"
    named = []
    for command in commands:
        arguments = _parser().parse_args(shlex.split(command)[1:])
        if getattr(arguments, "config", None):
            named.append(arguments.config)
            assert isinstance(load_config(arguments.config, tuple(arguments.set)), TrainConfig)
    assert f"configs/{path.name}" in named


def _readme_tree() -> dict[str, str]:
    """What the README's tree says of each module, by its path in the package."""
    said, folder = {}, ""
    text = (ROOT / "README.md").read_text()
    for line in text[text.index("\nllava_jax/\n") : text.index("\nconfigs/ ")].splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S*) *(.*)", line).groups()
        if name.endswith("/"):
            folder = name if indent else ""
        elif name:
            said[(folder if len(indent) == 4 else "") + name] = description
    return said


def test_the_readme_lists_every_module_with_its_docstring():
    docs = {str(path.relative_to(PACKAGE)): ast.get_docstring(ast.parse(path.read_text())) or "" for path in MODULES}
    found = {
        name: doc.splitlines()[0].removesuffix(".") for name, doc in docs.items() if not name.endswith("__init__.py")
    }
    assert _readme_tree() == found


def test_the_readmes_commands_parse_and_its_paths_exist():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^llava-jax .*$", text, re.MULTILINE)
    assert {shlex.split(command)[1] for command in commands} >= {
        "generate",
        "chat",
        "score",
        "train",
        "convert",
        "plan",
    }
    for command in commands:
        _parser().parse_args(shlex.split(command, comments=True)[1:])
    for path in re.findall(r"(?:configs|docs|benchmarks|scripts)/[\w./]*", text):
        assert (ROOT / path).exists(), path
