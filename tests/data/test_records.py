"""Record files: where records lie, what is refused, and that nothing else is ever raised."""

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data.records import Record, RecordFile, Turn, find_spans, parse_record
from llava_jax.errors import DataError, Refused

HUMAN = {"from": "human", "value": "Hi?"}
GPT = {"from": "gpt", "value": "Yes."}
TURNS = [HUMAN, GPT]
RECORDS = [
    {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWas ist das? 出口 🚪"}, GPT]},
    {"id": "ü", "conversations": TURNS},
    {"conversations": [HUMAN, {"from": "gpt", "value": 'br]ack,et "quoted" \\ \u2028 } ['}]},
]
BOM = b"\xef\xbb\xbf"


def _open(path: Path) -> RecordFile:
    return RecordFile(str(path), find_spans(str(path)))


def _write(tmp_path: Path, name: str, data: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def _lines(end: str = "\n", **options) -> bytes:
    return "".join(json.dumps(record, **options) + end for record in RECORDS).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("compact.json", json.dumps(RECORDS, separators=(",", ":"))),
        ("indented.json", json.dumps(RECORDS, indent=4, ensure_ascii=False)),
        ("escaped.json", json.dumps(RECORDS, ensure_ascii=True)),
        (
            "spaced.json",
            " \r\n\t[\r\n " + " ,\r\n\t ".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + " ] \n",
        ),
        ("bom.json", BOM + json.dumps(RECORDS, ensure_ascii=False).encode()),
        ("bom_ascii.json", BOM + json.dumps(RECORDS).encode()),
        ("unix.jsonl", _lines(ensure_ascii=False)),
        ("windows.jsonl", _lines("\r\n")),
        ("bom.jsonl", BOM + _lines(ensure_ascii=False)),
        ("empty_lines.jsonl", b"\n\r\n  \n" + _lines("\n\n \t\n")),
        ("no_last_newline.jsonl", _lines(ensure_ascii=False).rstrip(b"\n")),
    ],
)
def test_every_spelling_of_a_file_holds_the_same_records(tmp_path: Path, name: str, data: bytes | str):
    records = _open(_write(tmp_path, name, data))
    assert [records[i] for i in range(len(records))] == [parse_record(record) for record in RECORDS]


def test_records_are_read_in_any_order_and_after_pickling(tmp_path: Path):
    records = pickle.loads(pickle.dumps(_open(_write(tmp_path, "r.json", json.dumps(RECORDS, ensure_ascii=False)))))
    assert [records[i].turns[-1].text for i in (2, 0, 1)] == ['br]ack,et "quoted" \\ \u2028 } [', "Yes.", "Yes."]


def test_a_record_is_images_and_turns():
    assert parse_record(RECORDS[0]) == Record(
        ("a.png",), (Turn("user", "<image>\nWas ist das? 出口 🚪"), Turn("assistant", "Yes."))
    )


def test_several_pictures_keep_their_order():
    assert parse_record({"image": ["b.png", "a.png"], "conversations": TURNS}).images == ("b.png", "a.png")


def test_an_opening_assistant_turn_is_dropped():
    assert parse_record({"conversations": [GPT, HUMAN, GPT]}) == parse_record({"conversations": TURNS})


def test_a_key_that_is_given_twice_counts_once():
    value = json.loads('{"conversations": [], "conversations": [{"from": "user", "value": "Hi?"}]}')
    assert parse_record(value).turns == (Turn("user", "Hi?"),)


DEEP = "[" * 100_000
MALFORMED = {
    "null": "null",
    "true": "true",
    "number": "7",
    "nan": "NaN",
    "infinity": "-Infinity",
    "huge number": "1e999",
    "ten thousand digits": "1" * 10_000,
    "string": '"conversations"',
    "list": "[]",
    "no conversations": "{}",
    "null conversations": '{"conversations": null}',
    "empty conversations": '{"conversations": []}',
    "conversations as object": '{"conversations": {"from": "human", "value": "x"}}',
    "conversations as text": '{"conversations": "human: hi"}',
    "turn as text": '{"conversations": ["hi"]}',
    "turn null": '{"conversations": [null]}',
    "turn as list": '{"conversations": [["human", "hi"]]}',
    "turn without role": '{"conversations": [{"value": "hi"}]}',
    "turn without text": '{"conversations": [{"from": "human"}]}',
    "unknown role": '{"conversations": [{"from": "system", "value": "hi"}]}',
    "role in capitals": '{"conversations": [{"from": "Human", "value": "hi"}]}',
    "role null": '{"conversations": [{"from": null, "value": "hi"}]}',
    "role as number": '{"conversations": [{"from": 1, "value": "hi"}]}',
    "role as list": '{"conversations": [{"from": ["human"], "value": "hi"}]}',
    "role as object": '{"conversations": [{"from": {}, "value": "hi"}]}',
    "text null": '{"conversations": [{"from": "human", "value": null}]}',
    "text as number": '{"conversations": [{"from": "human", "value": 3}]}',
    "text as list": '{"conversations": [{"from": "human", "value": ["hi"]}]}',
    "lone high surrogate": '{"conversations": [{"from": "human", "value": "\\ud83d"}]}',
    "lone low surrogate": '{"conversations": [{"from": "human", "value": "a\\udc80b"}]}',
    "two users": json.dumps({"conversations": [HUMAN, HUMAN]}),
    "two assistants": json.dumps({"conversations": [HUMAN, GPT, GPT]}),
    "assistant twice at the start": json.dumps({"conversations": [GPT, GPT]}),
    "image null": json.dumps({"image": None, "conversations": TURNS}),
    "image empty": json.dumps({"image": "", "conversations": TURNS}),
    "image number": json.dumps({"image": 5, "conversations": TURNS}),
    "image false": json.dumps({"image": False, "conversations": TURNS}),
    "image object": json.dumps({"image": {"path": "a.png"}, "conversations": TURNS}),
    "image list of numbers": json.dumps({"image": [1], "conversations": TURNS}),
    "image list of lists": json.dumps({"image": [["a.png"]], "conversations": TURNS}),
    "image list with null": json.dumps({"image": ["a.png", None], "conversations": TURNS}),
    "image with a surrogate": json.dumps({"image": "\ud800.png", "conversations": TURNS}),
    "image with an escaped byte": json.dumps({"image": ["a.png", "\udc80.png"], "conversations": TURNS}),
    "deep conversations": '{"conversations": ' + "[" * 900 + "]" * 900 + "}",
}
NOT_JSON = {
    "word": "hello",
    "half an object": '{"conversations": [',
    "single quotes": "{'conversations': []}",
    "trailing comma": '{"conversations": [],}',
    "comment": '{"conversations": []} // done',
    "control character": '{"conversations": "a\x01b"}',
    "nul": '{"conversations": []}\0',
    "bad escape": '{"conversations": "\\x41"}',
    "deep": DEEP,
    "deep object": '{"a":' * 100_000,
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_value_is_refused_and_the_next_one_is_read(tmp_path: Path, text: str):
    good = json.dumps({"conversations": TURNS})
    for name, data in (("r.jsonl", f"{text}\n{good}\n"), ("r.json", f"[{text}, {good}]")):
        path = _write(tmp_path, name, data)
        try:
            records = _open(path)
        except DataError as error:
            # A number that Python will not parse makes the whole list unreadable.
            assert name == "r.json"
            assert str(path) in str(error)  # noqa: PT017
            continue
        with pytest.raises(Refused) as refusal:
            records[0]
        assert refusal.value.reason == "malformed"
        assert records[1].turns == (Turn("user", "Hi?"), Turn("assistant", "Yes."))


@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_json_is_refused_in_lines_and_stops_a_list(tmp_path: Path, text: str):
    good = json.dumps({"conversations": TURNS})
    records = _open(_write(tmp_path, "r.jsonl", f"{good}\n{text}\n{good}\n"))
    with pytest.raises(Refused) as refusal:
        records[1]
    assert refusal.value.reason == "malformed"
    assert records[2] == records[0]
    path = _write(tmp_path, "r.json", f"[{good},\n{text},\n{good}]")
    with pytest.raises(DataError) as error:
        find_spans(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "data",
    [b'\xff{"conversations": []}', b'{"conversations": "\xe4"}', '{"conversations": []}'.encode("utf-16"), b"\0" * 9],
)
def test_other_encodings_are_refused(tmp_path: Path, data: bytes):
    with pytest.raises(Refused, match="malformed"):
        _open(_write(tmp_path, "r.jsonl", data.replace(b"\n", b"")))[0]
    with pytest.raises(DataError):
        find_spans(str(_write(tmp_path, "r.json", b"[" + data + b"]")))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("r.json", b"", "expected a list"),
        ("r.json", b"   ", "expected a list"),
        ("r.json", b"{}", "expected a list"),
        ("r.json", b"null", "expected a list"),
        ("r.json", b"[]", "at least one record"),
        ("r.json", b"[ \n]", "at least one record"),
        ("r.json", b"[", "line 1 column 2"),
        ("r.json", b"[\n{},\n", "line 3 column 1"),
        ("r.json", b"[\n{}\n{}]", "line 3 column 1"),
        ("r.json", b"[\n{},]", "line 2 column 4"),
        ("r.json", b"[{}]\n[{}]", "line 2 column 1"),
        ("r.json", b"[{}] and more", "line 1 column 6"),
        ("r.jsonl", b"", "at least one record"),
        ("r.jsonl", b"\n \r\n", "at least one record"),
        ("r.jsonl", BOM, "at least one record"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path: Path, name: str, data: bytes, says: str):
    path = _write(tmp_path, name, data)
    with pytest.raises(DataError, match=says) as error:
        find_spans(str(path))
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            find_spans(str(path))


@pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
@pytest.mark.parametrize(
    "data",
    [
        json.dumps(RECORDS, ensure_ascii=False).encode(),
        BOM + json.dumps(RECORDS, indent=2).replace("},", "\r\n},").encode(),
        b'[true, false,null, 12.5e3,\n-7 ,"\\ud83d\\udeaa \\\\", "\xe2\x82\xac", [[], {}], -Infinity]',
    ],
    ids=["plain", "indented", "values"],
)
def test_what_is_read_at_a_time_changes_no_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, block: int
):
    path = _write(tmp_path, "r.json", data)
    monkeypatch.setattr("llava_jax.data.records.BLOCK", block)
    text = data.removeprefix(BOM).decode()
    spans = [data[start:end] for start, end in find_spans(str(path))]
    assert [json.loads(span) for span in spans] == json.loads(text)


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_what_is_read_at_a_time_changes_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr("llava_jax.data.records.BLOCK", block)
    for data, says in (
        ('[{"a": "\u00fc"},\n {"b": 1}\n, {"c": tru}]', "Expecting value at line 3 column 9"),
        ('[{"a": 1},\n {"b": "no end', "Unterminated string starting at at line 2 column 8"),
        ('[{"a": 1},\n {"b": 1} {"c": 2}]', "expected ',' or ']' at line 2 column 11"),
    ):
        with pytest.raises(DataError, match=says):
            find_spans(str(_write(tmp_path, "r.json", data)))
    with pytest.raises(DataError, match="expected UTF-8 near byte 19"):
        find_spans(str(_write(tmp_path, "r.json", b'[{"a": 1},\n {"b": "\xff"}]')))


@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_of_a_file_only_a_part_is_ever_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    record = json.dumps({"conversations": [HUMAN, {"from": "gpt", "value": "🚪" * 200}]}, ensure_ascii=False)
    joined = "[" + ",\n".join([record] * 4000) + "]" if name == "r.json" else (record + "\n") * 4000
    path = _write(tmp_path, name, joined)
    monkeypatch.setattr("llava_jax.data.records.BLOCK", 1 << 14)
    tracemalloc.start()
    try:
        assert len(find_spans(str(path))) == 4000
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 5
    finally:
        tracemalloc.stop()


def test_spans_are_bytes_not_characters(tmp_path: Path):
    path = _write(tmp_path, "r.json", '[{"a": "🚪ü"}, {"b": 1}]')
    np.testing.assert_array_equal(find_spans(str(path)), [[1, 16], [18, 26]])
    assert path.read_bytes()[18:26] == b'{"b": 1}'


def test_random_bytes_never_raise_anything_else(tmp_path: Path):
    rng = np.random.default_rng(0)
    clean = json.dumps(RECORDS, ensure_ascii=False).encode()
    for number in range(300):
        data = bytearray(clean)
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(0, 256)
        name = "r.jsonl" if number % 2 else "r.json"
        path = _write(tmp_path, name, bytes(data)[1:-1].replace(b"}, {", b"}\n{") if number % 2 else bytes(data))
        try:
            records = _open(path)
        except DataError:
            continue
        for i in range(len(records)):
            try:
                records[i]
            except Refused as refusal:
                assert refusal.reason == "malformed"  # noqa: PT017
