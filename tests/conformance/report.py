"""Recorded cases of a directory, and what the conformance run counts of them.

A module `test_<folder>.py` claims files of the directory: those that a test reads, by `@reads(...)`, and those that
such a file refers to, in its `COMPANIONS`. A file that nobody claims is a failure, and so is a field that a test
does not name.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest


class Case(NamedTuple):
    """One record; `family` is its file without ending, relative to the directory `root`."""

    family: str
    name: str
    record: Any
    root: Path


Loader = Callable[[Path], Iterable[tuple[str, Any]]]


def read_records(path: Path) -> Iterable[tuple[str, Any]]:
    """Lines of a .jsonl, elements of a JSON list, or values of a JSON object, each with a name."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        value: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        value = json.loads(text)
    if isinstance(value, dict):
        return list(value.items())
    return [(str(record.get("id", i) if isinstance(record, dict) else i), record) for i, record in enumerate(value)]


def reads(*files: str, cases: Loader = read_records) -> pytest.MarkDecorator:
    """The test runs once, as argument `case`, for every record of these files; paths are relative to the directory."""
    return pytest.mark.reads(files=files, cases=cases)


def expect_fields(record: Mapping[str, Any], *known: str) -> None:
    """Fails on a field whose meaning the test does not know."""
    unknown = sorted(set(record) - set(known))
    assert not unknown, f"unknown fields: {', '.join(unknown)}"


def not_built(name: str) -> NoReturn:
    """Ends a case whose behaviour belongs to a later stage; it is counted under that name, never as passed."""
    pytest.skip(NOT_BUILT + name)


NOT_BUILT = "not built yet: "
