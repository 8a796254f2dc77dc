"""Batches: the same on any number of hosts and workers, from any step on, with damaged pictures replaced."""

import dataclasses
import json
import multiprocessing
import pickle
import shutil
import time
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import pytest

from llava_jax.data.index import load_index
from llava_jax.data.pipeline import Batch, RowReader, read_batches
from llava_jax.data.plan import make_plan
from llava_jax.data.rows import Augment, Captions, Conversations, Needs, Row
from llava_jax.data.templates import V1
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.errors import DataError

ROWS = Conversations(template=V1, length=256, tiles=4)
EPOCH = {"batch_rows": 4, "epochs": 1}


def _reader(
    data: Path,
    *,
    rows=ROWS,
    first_step: int = 0,
    process: int = 0,
    num_processes: int = 1,
    rows_multiple: int = 4,
    **batch,
) -> RowReader:
    needs = Needs(
        tokenizer=open_tokenizer(str(data / "tokenizer")),
        image_root=str(data / "pictures"),
        image_size=16,
        num_features=4,
    )
    index = load_index(str(data / "records.json"), rows, needs, data / "cache")
    settings = {"batch_rows": None, "batch_records": None, "epochs": None, "steps": None}
    plan = make_plan(
        index,
        rows.capacity,
        seed=3,
        shuffle=True,
        rows_multiple=rows_multiple,
        **(settings | (batch or {"batch_rows": 4, "steps": 7})),
    )
    return RowReader(
        index=index,
        plan=plan,
        rows=rows,
        needs=needs,
        first_step=first_step,
        places=np.array_split(np.arange(plan.rows_per_step), num_processes)[process],
    )


def _read(data: Path, *, num_workers: int = 0, **changes) -> list[Batch]:
    return list(read_batches(_reader(data, **changes), num_workers=num_workers))


def _join(shares: list[list[Batch]]) -> list[Batch]:
    """The global batches that the hosts' shares make up."""
    steps = zip(*shares, strict=True)
    return [{name: np.concatenate([share[name] for share in step]) for name in step[0]} for step in steps]


def _assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
            assert one[name].dtype == other[name].dtype, name


@pytest.fixture(scope="module")
def own(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the data, so that caches stay with the module that made them."""
    return Path(shutil.copytree(data, tmp_path_factory.mktemp("own") / "data"))


@pytest.fixture
def damaged(own: Path, tmp_path: Path) -> Path:
    """The data with two pictures truncated after they were measured."""
    folder = Path(shutil.copytree(own, tmp_path / "data"))
    _reader(folder)
    for name in ("5_0.png", "9_1.png"):
        path = folder / "pictures" / name
        path.write_bytes(path.read_bytes()[:-60])
    return folder


def test_batches_are_the_plans_rows(own: Path):
    reader = _reader(own)
    batches = _read(own)
    assert len(batches) == reader.plan.num_steps == 7
    for step, batch in enumerate(batches):
        for place in range(4):
            row = reader.plan.row(step * 4 + place)
            ids = batch["record_ids"][place]
            np.testing.assert_array_equal(ids[: len(row)], row)
            assert (ids[len(row) :] == -1).all()
            assert batch["segment_ids"][place].max() == len(row)
        assert batch["tokens"].shape == (4, 256)
        assert batch["images"].shape == (4, 4, 16, 16, 3)
        assert not batch["num_replaced"].any()


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_workers_change_nothing(own: Path, num_workers: int):
    _assert_same(_read(own, num_workers=num_workers), _read(own))


@pytest.mark.parametrize("batch", [{"batch_rows": 4, "steps": 7}, {"batch_records": 14, "epochs": 2}], ids=str)
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_hosts_share_the_global_batch_without_changing_it(own: Path, num_processes: int, batch: dict):
    whole = _read(own, **batch)
    shares = [_read(own, process=process, num_processes=num_processes, **batch) for process in range(num_processes)]
    joined = _join(shares)
    _assert_same(joined, whole)


@pytest.mark.parametrize(
    ("first_step", "num_workers"),
    [(1, 0), (4, 0), (6, 0), (3, 2), pytest.param(6, 2, marks=pytest.mark.nightly)],
)
def test_a_run_that_starts_later_reads_what_it_would_have_read(own: Path, first_step: int, num_workers: int):
    _assert_same(_read(own, first_step=first_step, num_workers=num_workers), _read(own)[first_step:])


def test_a_finished_run_reads_nothing(own: Path):
    assert _read(own, first_step=7) == []


def test_augmentation_follows_the_place_in_the_plan_alone(tmp_path: Path, own: Path):
    folder = Path(shutil.copytree(own, tmp_path / "data"))
    names = sorted(path.name for path in (folder / "pictures").iterdir())
    records = [
        {
            "image": name,
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"a square {name}"}],
        }
        for name in names
    ]
    (folder / "records.json").write_text(json.dumps(records))
    rows = Captions(length=16, augment=Augment(mirror=True, shift=2))
    settings = {"rows": rows, "batch_records": 12, "epochs": 2}
    whole = _read(folder, **settings)
    _assert_same(_read(folder, first_step=3, **settings), whole[3:])
    shares = [_read(folder, process=process, num_processes=2, **settings) for process in range(2)]
    joined = _join(shares)
    _assert_same(joined, whole)
    # More devices may need more rows of padding.
    wide = _read(folder, rows_multiple=8, **settings)
    assert len(wide[0]["images"]) > len(whole[0]["images"])
    for batch, padded in zip(whole, wide, strict=True):
        np.testing.assert_array_equal(batch["images"], padded["images"][: len(batch["images"])])
    ids = np.concatenate([batch["record_ids"][:, 0] for batch in whole])
    pictures = np.concatenate([batch["images"] for batch in whole])
    shown = [pictures[ids == number] for number in range(8)]
    assert any((views[0] != views[1]).any() for views in shown), "a second epoch shows a picture in another way"


def test_a_damaged_picture_is_replaced_and_counted(own: Path, damaged: Path):
    clean, mended = _read(own, **EPOCH), _read(damaged, **EPOCH)
    reader = _reader(damaged, **EPOCH)
    replaced = 0
    for before, after in zip(clean, mended, strict=True):
        changed = before["record_ids"] != after["record_ids"]
        assert set(before["record_ids"][changed]) <= {5, 9}
        for old, new in zip(before["record_ids"][changed], after["record_ids"][changed], strict=True):
            assert new not in (-1, 5, 9)
            room, size = reader.index.size(int(old)), reader.index.size(int(new))
            assert size.tokens <= room.tokens
            assert size.tiles <= room.tiles
        np.testing.assert_array_equal(after["num_replaced"], changed.sum(axis=1))
        replaced += int(changed.sum())
    assert replaced == sum(np.isin(batch["record_ids"], (5, 9)).sum() for batch in clean) > 0
    assert not any(np.isin(batch["record_ids"], (5, 9)).any() for batch in mended)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_every_host_replaces_a_damaged_picture_alike(damaged: Path, num_processes: int):
    whole = _read(damaged, **EPOCH)
    shares = [_read(damaged, process=process, num_processes=num_processes, **EPOCH) for process in range(num_processes)]
    joined = _join(shares)
    _assert_same(joined, whole)


@pytest.mark.nightly
def test_every_worker_replaces_a_damaged_picture_alike(damaged: Path):
    _assert_same(_read(damaged, num_workers=2, first_step=2, **EPOCH), _read(damaged, **EPOCH)[2:])


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_record_without_a_substitute_stops_the_run_by_name(tmp_path: Path, own: Path, num_workers: int):
    folder = Path(shutil.copytree(own, tmp_path / "data"))
    _reader(folder)
    shutil.rmtree(folder / "pictures")
    (folder / "pictures").mkdir()
    # Records without pictures can stand in for pictures; take those away as well.
    records = [record for record in json.loads((folder / "records.json").read_text()) if "image" in record]
    (folder / "records.json").write_text(json.dumps(records))
    for record in records:
        names = record["image"] if isinstance(record["image"], list) else [record["image"]]
        for name in names:
            shutil.copy(own / "pictures" / name, folder / "pictures" / name)
    reader = _reader(folder)
    shutil.rmtree(folder / "pictures")
    with pytest.raises(DataError, match="missing picture.*Mend the data"):
        list(read_batches(reader, num_workers=num_workers))


class _Hanging(RowReader):
    """Rows of later steps never come."""

    def __getitem__(self, index: SupportsIndex) -> Row:
        if int(index) >= 8:
            time.sleep(600)
        return super().__getitem__(index)


def test_a_worker_that_hangs_does_not_hold_up_the_end(own: Path):
    reader = _reader(own)
    fields = {field.name: getattr(reader, field.name) for field in dataclasses.fields(reader)}
    batches = read_batches(_Hanging(**fields), num_workers=1)
    next(batches)
    begin = time.monotonic()
    batches.close()
    assert time.monotonic() - begin < 10
    assert not multiprocessing.active_children()


def test_a_pickled_reader_ships_no_records(own: Path):
    reader = _reader(own)
    assert len(pickle.dumps(reader)) < 40_000
    row, again = reader[5], pickle.loads(pickle.dumps(reader))[5]
    for name in row:
        np.testing.assert_array_equal(row[name], again[name])
