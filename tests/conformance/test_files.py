"""Every file of the directory belongs to a family that some module knows."""

import fnmatch
import importlib
from pathlib import Path

import pytest

from tests.conformance.conftest import golden_root

# What a directory says about itself.
COMPANIONS = ("README.md",)


def _claims() -> list[str]:
    claims: list[str] = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.conformance.{path.stem}")
        claims += getattr(module, "COMPANIONS", ())
        for member in vars(module).values():
            marks = [mark for mark in getattr(member, "pytestmark", ()) if mark.name == "reads"]
            claims += [file for mark in marks for file in mark.kwargs["files"]]
    return claims


def test_every_file_belongs_to_a_known_family(request: pytest.FixtureRequest):
    root = golden_root(request.config)
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert files, f"{root} holds no recorded case"
    claims = _claims()
    unknown = [file for file in files if not any(fnmatch.fnmatchcase(file, claim) for claim in claims)]
    assert not unknown, f"unknown files: {', '.join(unknown)}"
