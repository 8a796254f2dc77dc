"""The run fails on what it does not know: a family, or a field of a record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.conftest import SMALL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records of keywords, one with a field that nobody knows, and a family that nobody knows."""
    path = tmp_path_factory.mktemp("recorded")
    (path / "conversations").mkdir()
    first, second, *_ = (SMALL / "conversations" / "stopping.jsonl").read_text().splitlines()
    records = [json.loads(first), json.loads(second) | {"beams": 4}]
    (path / "conversations" / "stopping.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "audio").mkdir()
    (path / "audio" / "waves.jsonl").write_text("{}\n")
    return path


def test_an_unknown_family_and_an_unknown_field_fail_the_run(directory: Path):
    modules = [f"tests/conformance/test_{name}.py" for name in ("files", "conversations")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *modules, "--golden", str(directory)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout
    assert "unknown files: audio/waves.jsonl" in run.stdout
    assert "unknown fields: beams" in run.stdout
    assert run.stdout.count("FAILED") == 2
    (row,) = (line for line in run.stdout.splitlines() if line.startswith("conversations/stopping"))
    assert row.split() == ["conversations/stopping", "1", "0", "0", "1"]
