"""The index and its cache: what is measured, refused, kept, and measured again."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data import index as index_module
from llava_jax.data import workers
from llava_jax.data.index import Index, check_refusals, check_replaced, load_index
from llava_jax.data.mix import Records, as_mix, open_records
from llava_jax.data.rows import Augment, Captions, Conversations, Needs, Size
from llava_jax.data.templates import PLAIN, V1
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.data.workers import ask_all
from llava_jax.errors import DataError
from tests.data.test_plan import make_index

ROWS = Conversations(template=V1, length=256, tiles=4)


@pytest.fixture
def copied(data: Path, tmp_path: Path) -> Path:
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def _needs(folder: Path, **changes) -> Needs:
    return Needs(
        **{
            "tokenizer": open_tokenizer(str(folder / "tokenizer")),
            "image_root": str(folder / "pictures"),
            "image_size": 16,
            "num_features": 4,
        }
        | changes
    )


def _load(folder: Path, rows=ROWS, **changes) -> Index:
    return load_index(str(folder / "records.json"), rows, _needs(folder, **changes), folder / "cache")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one each time a file is measured."""
    calls: list[str] = []
    measure = index_module._measure

    def counted(records: Records, *arguments):
        calls.append(records.path)
        return measure(records, *arguments)

    monkeypatch.setattr(index_module, "_measure", counted)
    return calls


def _assert_same(first: Index, second: Index) -> None:
    for name in ("tokens", "tiles"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for one, other in zip(first.records.sources, second.records.sources, strict=True):
        np.testing.assert_array_equal(one.spans, other.spans)
    assert first.refused == second.refused
    assert first.fingerprint == second.fingerprint


def test_a_file_is_measured_once(copied: Path, measured: list[str]):
    _assert_same(_load(copied), _load(copied))
    assert len(measured) == 1


def test_sizes_are_those_of_the_records(copied: Path, needs: Needs):
    index = _load(copied)
    assert index.counts() == {}
    assert len(index.usable) == len(index.records) == 60
    for number in range(0, 60, 7):
        assert index.size(number) == ROWS.measure(index.records[number], _needs(copied))


def test_what_the_decoder_has_no_positions_for_is_refused(copied: Path):
    longest = int(_load(copied).tokens.max())
    assert _load(copied, max_positions=longest).counts() == {}
    shorter = _load(copied, max_positions=longest - 1)
    assert shorter.counts()["too long"] >= 1
    assert shorter.tokens.max() < longest


def _spoil(copied: Path, *numbers: int) -> None:
    records = json.loads((copied / "records.json").read_text())
    for number in numbers:
        records[number]["conversations"] = []
    (copied / "records.json").write_text(json.dumps(records))


def test_refused_records_are_counted_and_cached(copied: Path, measured: list[str]):
    _spoil(copied, 3, 10)
    first, second = _load(copied), _load(copied)
    _assert_same(first, second)
    assert first.counts() == {"malformed": 2}
    assert set(first.refused) == {3, 10}
    assert first.size(3) == Size(0, 0)
    assert 3 not in first.usable
    check_refusals(first, 2 / 60)
    with pytest.raises(DataError, match=r"2 of 60.*'malformed': 2.*record 3, malformed: 'conversations'"):
        check_refusals(first, 1 / 60)


def test_a_run_that_goes_on_does_not_look_again(copied: Path, measured: list[str]):
    """Its plan is the one it began with, even if a picture that was out of reach at the start can now be read."""
    shutil.move(copied / "pictures", copied / "elsewhere")
    first = _load(copied)
    assert first.counts()["missing picture"] > 0
    shutil.move(copied / "elsewhere", copied / "pictures")
    rows, needs = ROWS, _needs(copied)
    _assert_same(load_index(str(copied / "records.json"), rows, needs, copied / "cache", look_again=False), first)
    assert len(measured) == 1
    assert _load(copied).counts() == {}
    assert len(measured) == 2


def test_a_few_replaced_records_pass_and_many_do_not():
    check_replaced(20, 21, 0.005)
    check_replaced(50, 10_000, 0.005)
    with pytest.raises(DataError, match=r"At most 0\.5% .* 51 of 10000 were"):
        check_replaced(51, 10_000, 0.005)


def test_a_file_of_refused_records_never_passes():
    with pytest.raises(DataError, match="2 of 2"):
        check_refusals(make_index([1, 1], refused=[0, 1]), 1.0)


def test_missing_pictures_that_were_put_back_are_seen(copied: Path):
    """The user who mends what the message says must be able to go on."""
    shutil.move(copied / "pictures", copied / "elsewhere")
    assert _load(copied).counts()["missing picture"] > 0
    shutil.move(copied / "elsewhere", copied / "pictures")
    assert _load(copied).counts() == {}


def test_a_corrected_picture_folder_is_seen(copied: Path):
    assert _load(copied, image_root=str(copied / "wrong")).counts()["missing picture"] > 0
    assert _load(copied).counts() == {}


def _damages(clean: bytes) -> list[bytes]:
    rng = np.random.default_rng(0)
    damages = [b"", b"x", clean[:4], clean[: len(clean) // 2], clean[:-1], b"\0" * len(clean), clean[100:]]
    for at in rng.integers(0, len(clean), 60):
        flipped = bytearray(clean)
        flipped[at] ^= 1 << rng.integers(0, 8)
        damages.append(bytes(flipped))
    return damages


def test_a_damaged_cache_is_measured_again_or_was_unhurt(copied: Path, measured: list[str]):
    clean = _load(copied)
    (stored,) = (copied / "cache").iterdir()
    for damage in _damages(stored.read_bytes()):
        stored.write_bytes(damage)
        _assert_same(_load(copied), clean)
    assert len(measured) > 7


# What bits can turn a header of a cache, and the zip file's list of its members, into.
IN_HEADERS = {
    "no dictionary": (b"), }", b"), |"),
    "a smaller number": (b"(1200,)", b"(120 ,)"),
    "no column": (b"(1200, 2)", b"(1200, 0)"),
    "another type": (b"<i4", b"<i2"),
    "encryption": (b"PK\1\2-\3-\0\0\0", b"PK\1\2-\3-\0\1\0"),
}


def test_a_damaged_header_of_a_large_cache_is_measured_again(copied: Path, measured: list[str]):
    """numpy takes a header from the first 4 kB of a member; zipfile compares its checksum at its end, if ever."""
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "A square."}]
    (copied / "records.json").write_text(json.dumps([{"conversations": turns}] * 1200))
    clean = _load(copied)
    (stored,) = (copied / "cache").iterdir()
    data = stored.read_bytes()
    for number, (written, damaged) in enumerate(IN_HEADERS.values(), start=2):
        assert written in data
        stored.write_bytes(data.replace(written, damaged, 1))
        _assert_same(_load(copied), clean)
        assert len(measured) == number


def test_a_cache_of_another_number_of_records_is_measured_again(copied: Path, measured: list[str]):
    clean = _load(copied)
    (stored,) = (copied / "cache").iterdir()
    for name in ("tokens", "tiles", "spans_0"):
        with np.load(stored) as arrays:
            values = dict(arrays)
        np.savez(stored, **values | {name: values[name][:-1]})
        _assert_same(_load(copied), clean)
    assert len(measured) == 4


def test_a_damaged_cache_may_be_removed_by_another_process_first(
    copied: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
):
    def removed(stored: Path, *arguments, **more):
        stored.unlink()
        raise ValueError

    clean = _load(copied)
    monkeypatch.setattr(index_module, "_read", removed)
    _assert_same(_load(copied), clean)
    assert len(measured) == 2


def test_records_that_cannot_be_read_do_not_cost_the_cache(copied: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments, **more):
        raise DataError("Parquet and Arrow files need pyarrow.")

    _load(copied)
    monkeypatch.setattr(index_module, "open_records", refuse)
    with pytest.raises(DataError, match="pyarrow"):
        _load(copied)
    assert len(list((copied / "cache").iterdir())) == 1


CHANGES = {
    "template": dataclasses.replace(ROWS, template=PLAIN),
    "words": dataclasses.replace(ROWS, template=dataclasses.replace(V1, system="Be brief.")),
    "length": dataclasses.replace(ROWS, length=255),
    "tiles": dataclasses.replace(ROWS, tiles=3),
    "overflow": dataclasses.replace(ROWS, overflow="text"),
    "captions": Captions(length=16),
    "augmented captions": Captions(length=16, augment=Augment(mirror=True)),
}


@pytest.mark.parametrize("rows", CHANGES.values(), ids=CHANGES)
def test_another_row_format_is_measured_again(copied: Path, measured: list[str], rows):
    before = _load(copied)
    after = _load(copied, rows)
    assert len(measured) == 2
    assert after.fingerprint != before.fingerprint
    _assert_same(_load(copied), before)
    _assert_same(_load(copied, rows), after)
    assert len(measured) == 2


def test_other_pictures_slots_are_measured_again(copied: Path, measured: list[str]):
    assert (_load(copied, num_features=9).tokens != _load(copied).tokens).any()
    assert len(measured) == 2


def test_other_content_is_measured_again(copied: Path, measured: list[str]):
    before = _load(copied)
    text = (copied / "records.json").read_text()
    (copied / "records.json").write_text(text.replace("Which", "which", 1))
    assert _load(copied).fingerprint != before.fingerprint
    assert len(measured) == 2


def test_another_tokenizer_is_measured_again(copied: Path, measured: list[str]):
    before = _load(copied)
    path = copied / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:5]
    path.write_text(json.dumps(content))
    after = _load(copied)
    assert len(measured) == 2
    assert after.fingerprint != before.fingerprint
    assert (after.tokens > before.tokens).any()


def test_a_copied_file_keeps_its_fingerprint(copied: Path, tmp_path: Path):
    shutil.copytree(copied, tmp_path / "moved")
    assert _load(tmp_path / "moved").fingerprint == _load(copied).fingerprint


def test_a_missing_file_is_named(copied: Path):
    with pytest.raises(DataError, match="none.json"):
        load_index(str(copied / "none.json"), ROWS, _needs(copied), copied / "cache")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_measures_the_same(copied: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int):
    _spoil(copied, 3, 10)
    monkeypatch.setattr(workers, "CHUNK", 7)
    arguments = (str(copied / "records.json"), ROWS, _needs(copied))
    alone = load_index(*arguments, copied / "alone", num_workers=0)
    _assert_same(load_index(*arguments, copied / "many", num_workers=num_workers), alone)
    assert set(alone.refused) == {3, 10}


def test_a_source_that_breaks_in_a_worker_stops_the_run(copied: Path):
    path = copied / "records.json"
    records = open_records(as_mix(str(path)), as_written=False)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        list(ask_all(records.__getitem__, len(records), label="x", num_workers=1))
