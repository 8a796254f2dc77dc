"""Records in the original's JSON format: where each lies in its file, and what a well-formed one holds."""

import base64
import binascii
import codecs
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

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
_DECODER = json.JSONDecoder()
# Bytes of a file that are read at a time.
BLOCK = 1 << 22


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
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("malformed", f"text must be valid Unicode; got a lone surrogate in {_show(text)}") from None


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
    """Byte range of every record of a `.json` list or a `.jsonl` file; of the file a block at a time is held.

    Raises:
      DataError: the file is missing, empty, or not such a file; names line and column.
    """
    if not Path(path).is_file():
        raise DataError(f"data.records must name a JSON or JSONL file; got {path!r}, which does not exist.")
    find = _line_spans if path.endswith(".jsonl") else _list_spans
    try:
        with open(path, "rb") as file:
            spans = np.fromiter(itertools.chain.from_iterable(find(file)), np.int64).reshape(-1, 2)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"data.records must be a JSON list of records or, ending in .jsonl, one record a line; "
            f"{path!r} is not: {error}. Mend the file."
        ) from None
    if not len(spans):
        raise DataError(f"data.records must hold at least one record; {path!r} holds none.")
    return spans


def _line_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    end = 0
    for line in file:
        start, end = end, end + len(line)
        record = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
        if record.strip():
            yield end - len(record), end - record.endswith(b"\n")


def _list_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    text = _Scanner(file)
    if text.peek() != "[":
        raise text.error(f"expected a list, found {text.peek()!r}")
    text.take()
    if text.peek() != "]":
        while True:
            yield text.value()
            if text.peek() != ",":
                break
            text.take()
            if text.peek() == "]":
                raise text.error("expected a record after ','")
        if text.peek() != "]":
            raise text.error("expected ',' or ']'")
    text.take()
    if text.peek():
        raise text.error("expected nothing after the list")


class _Scanner:
    """Walks through the JSON text of a file and knows the byte it is at.

    Of the text a block is held, or more if the value in it is longer.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._at = "", 0
        # Where `_text` begins, for messages.
        self._line, self._column = 1, 1
        self.byte = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(self.byte)

    def peek(self) -> str:
        """The next character that is no white space, "" at the end; it is not taken."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None, "no white space is also a match"
            self._advance(found.end())
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def take(self) -> None:
        self._advance(self._at + 1)

    def value(self) -> tuple[int, int]:
        """Byte range of the JSON value that begins here."""
        start = self.byte
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
                error, is_cut = None, False
            except json.JSONDecodeError as problem:
                end, error = problem.pos, self.error(problem.msg, problem.pos)
                is_cut = problem.msg.startswith("Unterminated string")
            # The end of the block may also have cut a few letters that make one word, or a number.
            if (is_cut or end > len(self._text) - 16) and self._read():
                continue
            if error is not None:
                raise error
            self._advance(end)
            return start, self.byte

    def error(self, rule: str, at: int | None = None) -> ValueError:
        line, column = self._place(self._at if at is None else at)
        return ValueError(f"{rule} at line {line} column {column}")

    def _place(self, at: int) -> tuple[int, int]:
        lines = self._text.count("\n", 0, at)
        return self._line + lines, at - self._text.rfind("\n", 0, at) if lines else self._column + at

    def _advance(self, end: int) -> None:
        passed = self._text[self._at : end]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self._at = end

    def _read(self) -> bool:
        """Replaces what was passed by more of the file; False, and nothing changes, at its end."""
        # Twice as much each time that a value needs more, or a long one would be parsed anew for every block of it.
        data = self._file.read(max(BLOCK, len(self._text) - self._at))
        try:
            text = self._decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ValueError(f"expected UTF-8 near byte {self._file.tell() - len(data) + error.start}") from None
        if data:
            self._line, self._column = self._place(self._at)
            self._text, self._at = self._text[self._at :] + text, 0
        return bool(data)
