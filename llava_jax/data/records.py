"""Records in the original's JSON format: where each lies in its file, and what a well-formed one holds."""

import base64
import binascii
import json
import os
import re
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

# What JSON takes for white space, see RFC 8259.
_SPACE = re.compile(r"[ \t\n\r]*")


class Turn(NamedTuple):
    role: Literal["user", "assistant"]
    text: str


class Record(NamedTuple):
    """One sample: pictures, as relative names or bytes of files, and turns that alternate and begin with the user."""

    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]


def parse_record(value: Any, *, as_written: bool = False) -> Record:
    """Checks one JSON value against the format of the original (`docs/Finetune_Custom_Data.md` there).

    A picture that comes with its record is `{"bytes": ...}`, in JSON as base64, as Hugging Face's Image feature has it.
    A conversation that opens with the assistant loses that turn, as in `preprocess_v1` of the original; `as_written`
    leaves this, and whether turns alternate, to the caller.

    Raises:
      Refused: with the reason `malformed`.
    """
    if not isinstance(value, dict):
        raise Refused("malformed", f"a record must be a JSON object; got {_show(value)}")
    images = value.get("image", ())
    if isinstance(images, str | dict):
        images = (images,)
    if not isinstance(images, list | tuple):
        raise Refused("malformed", f"'image' must be a picture or a list of them; got {_show(images)}")
    images = [_parse_image(image) for image in images]
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


def _parse_image(value: Any) -> str | bytes:
    if isinstance(value, str) and value:
        require_unicode(value)
        return value
    content = value.get("bytes") if isinstance(value, dict) else None
    if isinstance(content, str):
        try:
            content = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            content = None
    if not isinstance(content, bytes):
        raise Refused("malformed", f"a picture must be a file name or {{'bytes': base64}}; got {_show(value)}")
    return content


def _parse_turn(value: Any) -> Turn:
    role = value.get("from") if isinstance(value, dict) else None
    if not isinstance(role, str) or role not in ROLES or not isinstance(value.get("value"), str):
        raise Refused("malformed", f"a turn must be {{'from': 'human' or 'gpt', 'value': text}}; got {_show(value)}")
    require_unicode(value["value"])
    return Turn(ROLES[role], value["value"])


def require_unicode(text: str) -> None:
    """Raises `Refused` for text that no tokenizer takes."""
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


def _skip(text: str, at: int) -> int:
    """The next place that is not white space."""
    found = _SPACE.match(text, at)
    assert found is not None, "no white space is also a match"
    return found.end()


def _list_spans(data: bytes) -> list[tuple[int, int]]:
    text = data.decode("utf-8-sig")
    decode = json.JSONDecoder().raw_decode
    offset = len(data) - len(text.encode()) if not text.isascii() else len(data) - len(text)
    spans: list[tuple[int, int]] = []
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"expected a list, found {text[at : at + 20]!r}")
    at = _skip(text, at + 1)
    byte, seen = offset, 0
    while text[at : at + 1] != "]":
        _, end = decode(text, at)
        start_byte = byte + len(text[seen:at].encode())
        byte = start_byte + len(text[at:end].encode())
        spans.append((start_byte, byte))
        seen = end
        at = _skip(text, end)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("expected a record after ','", text, at)
        elif text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']'", text, at)
    at = _skip(text, at + 1)
    if at != len(text):
        raise json.JSONDecodeError("expected nothing after the list", text, at)
    return spans
