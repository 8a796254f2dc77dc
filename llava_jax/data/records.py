"""Records in the original's JSON format: where each lies in its file, and what a well-formed one holds."""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from llava_jax.errors import DataError, Refused

ROLES: dict[str, Literal["user", "assistant"]] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


class Turn(NamedTuple):
    role: Literal["user", "assistant"]
    text: str


class Record(NamedTuple):
    """One sample: relative picture names, and turns that alternate and begin with the user."""

    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def parse_record(value: Any, *, as_written: bool = False) -> Record:
    """Checks one JSON value against the format of the original (`docs/Finetune_Custom_Data.md` there).

    A conversation that opens with the assistant loses that turn, as in `preprocess_v1` of the original; `as_written`
    leaves this, and whether turns alternate, to the caller.

    Raises:
      Refused: with the reason `malformed`.
    """
    if not isinstance(value, dict):
        raise Refused("malformed", f"a record must be a JSON object; got {_show(value)}")
    images = value.get("image", ())
    if isinstance(images, str):
        images = (images,)
    if not isinstance(images, list | tuple) or not all(isinstance(name, str) and name for name in images):
        raise Refused("malformed", f"'image' must be a file name or a list of them; got {_show(value['image'])}")
    for name in images:
        _require_unicode(name)
    conversations = value.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise Refused("malformed", f"'conversations' must be a list of turns; got {_show(conversations)}")
    turns = [_parse_turn(turn) for turn in conversations]
    if as_written:
        return Record(tuple(images), tuple(turns))
    if turns[0].role == "assistant":
        turns = turns[1:]
    for i, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[i % 2]:
            raise Refused("malformed", f"turns must alternate between human and gpt; turn {i} is again {turn.role}")
    return Record(tuple(images), tuple(turns))


def _parse_turn(value: Any) -> Turn:
    role = value.get("from") if isinstance(value, dict) else None
    if not isinstance(role, str) or role not in ROLES or not isinstance(value.get("value"), str):
        raise Refused("malformed", f"a turn must be {{'from': 'human' or 'gpt', 'value': text}}; got {_show(value)}")
    _require_unicode(value["value"])
    return Turn(ROLES[role], value["value"])


def _require_unicode(text: str) -> None:
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Refused("malformed", f"text must be valid Unicode; got a lone surrogate in {_show(text)}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class RecordFile:
    """Random access to the records of one file, a JSON list or JSON lines, without holding them in memory.

    Only the byte range of each record is kept; pickling one ships a path and two integers per record.
    """

    def __init__(self, path: str, spans: Int[np.ndarray, "n 2"], *, as_written: bool = False):
        self.path = path
        self.spans = spans
        self.as_written = as_written
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises `Refused` if it is malformed."""
        # Read, not mapped: a file that somebody shortens meanwhile must not kill the process.
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        start, end = map(int, self.spans[index])
        try:
            value = json.loads(os.pread(self._file, end - start, start))
            return parse_record(value, as_written=self.as_written)
        except (ValueError, RecursionError) as error:
            raise Refused("malformed", f"not JSON: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def find_spans(path: str) -> Int[np.ndarray, "n 2"]:
    """Byte range of every record of a `.json` list or a `.jsonl` file.

    Raises:
      DataError: the file is missing, empty, or not such a file; names line and column.
    """
    if not Path(path).is_file():
        raise DataError(f"data.records must name a JSON or JSONL file; got {path!r}, which does not exist.")
    data = Path(path).read_bytes()
    try:
        spans = _line_spans(data) if path.endswith(".jsonl") else _list_spans(data)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"data.records must be a JSON list of records or, ending in .jsonl, one record a line; "
            f"{path!r} is not: {error}. Mend the file."
        ) from None
    if not spans:
        raise DataError(f"data.records must hold at least one record; {path!r} holds none.")
    return np.array(spans, np.int64)


def _line_spans(data: bytes) -> list[tuple[int, int]]:
    spans, start = [], 3 if data.startswith(b"\xef\xbb\xbf") else 0
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            spans.append((start, end))
        start = end + 1
    return spans


def _list_spans(data: bytes) -> list[tuple[int, int]]:
    text = data.decode("utf-8-sig")
    decode, skip = json.JSONDecoder().raw_decode, json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    offset = len(data) - len(text.encode()) if not text.isascii() else len(data) - len(text)
    spans: list[tuple[int, int]] = []
    at = skip(text, 0).end()
    if text[at : at + 1] != "[":
        raise ValueError(f"expected a list, found {text[at : at + 20]!r}")
    at = skip(text, at + 1).end()
    byte, seen = offset, 0
    while text[at : at + 1] != "]":
        _, end = decode(text, at)
        start_byte = byte + len(text[seen:at].encode())
        byte = start_byte + len(text[at:end].encode())
        spans.append((start_byte, byte))
        seen = end
        at = skip(text, end).end()
        if text[at : at + 1] == ",":
            at = skip(text, at + 1).end()
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("expected a record after ','", text, at)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']'", text, at)
    at = skip(text, at + 1).end()
    if at != len(text):
        raise json.JSONDecodeError("expected nothing after the list", text, at)
    return spans
