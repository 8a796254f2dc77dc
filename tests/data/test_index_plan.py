"""The index and its cache; packing; published step counts; what the plan depends on."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llava_jax.data import index as index_module
from llava_jax.data import workers
from llava_jax.data.index import Index, check_refusals, check_replaced, load_index
from llava_jax.data.mix import Mix, Part, Records, as_mix, open_records
from llava_jax.data.plan import Plan, make_plan, pack
from llava_jax.data.records import RecordFile
from llava_jax.data.rows import Augment, Captions, Conversations, Needs, Size
from llava_jax.data.templates import PLAIN, V1
from llava_jax.data.tokenizer import open_tokenizer
from llava_jax.data.workers import ask_all
from llava_jax.errors import DataError

ROWS = Conversations(template=V1, length=256, tiles=4)
CAPACITY = Size(100, 3)


def _records(num_records: int, weights: tuple[float, ...] = (1.0,)) -> Records:
    """Parts of equal length that lie nowhere."""
    parts = tuple(Part(source="none.json", weight=weight) for weight in weights)
    spans = np.zeros((num_records // len(weights), 2), np.int64)
    return Records(Mix(parts=parts), tuple(RecordFile("none.json", spans) for _ in parts))


def _index(tokens, tiles=None, refused=(), weights=(1.0,)) -> Index:
    tokens = np.array(tokens, np.int32)
    tiles = np.zeros_like(tokens) if tiles is None else np.array(tiles, np.int32)
    tokens[list(refused)] = 0
    return Index(
        records=_records(len(tokens), weights),
        tokens=tokens,
        tiles=tiles,
        refused={int(i): "malformed: x" for i in refused},
        fingerprint="f",
    )


def _random_index(seed: int, num_records: int = 400) -> Index:
    rng = np.random.default_rng(seed)
    refused = rng.choice(num_records, num_records // 20, replace=False)
    return _index(rng.integers(1, 100, num_records), rng.integers(0, 4, num_records), refused)


def _plan(index: Index, capacity: Size = CAPACITY, **changes) -> Plan:
    settings = {
        "seed": 0,
        "shuffle": True,
        "batch_rows": None,
        "batch_records": None,
        "epochs": None,
        "steps": None,
        "rows_multiple": 1,
    }
    return make_plan(index, capacity, **(settings | changes))


def _rows(plan: Plan) -> list[list[int]]:
    return [plan.row(number).tolist() for number in range(plan.num_rows)]


def test_best_fit_packs_as_the_docstring_says():
    assert pack([0, 1, 2], _index([6, 5, 4]), Size(10, 0)) == [[0, 2], [1]]


def test_tiles_limit_a_row_as_tokens_do():
    index = _index([4, 1, 1, 1], [2, 2, 1, 1])
    assert pack(range(4), index, Size(10, 3)) == [[0, 2], [1, 3]]


def test_the_oldest_of_equally_full_rows_is_taken():
    assert pack(range(5), _index([6, 6, 6, 4, 4]), Size(10, 0)) == [[0, 3], [1, 4], [2]]


def _pack_slowly(order, index: Index, capacity: Size, open_rows: int) -> list[list[int]]:
    """Best fit over at most `open_rows` rows, written to be read: the fullest one closes when all are open."""
    rows: list[list[int]] = []
    free: dict[int, Size] = {}
    for record in order:
        size = index.size(int(record))
        fitting = [n for n, left in free.items() if left.tokens >= size.tokens and left.tiles >= size.tiles]
        if fitting:
            best = min(fitting, key=lambda n: (free[n].tokens, n))
        else:
            if len(free) == open_rows:
                del free[min(free, key=lambda n: (free[n].tokens, n))]
            best = len(rows)
            rows.append([])
            free[best] = capacity
        rows[best].append(int(record))
        free[best] = Size(free[best].tokens - size.tokens, free[best].tiles - size.tiles)
    return rows


@pytest.mark.parametrize("seed", range(6))
def test_packing_equals_a_slow_one(seed: int, monkeypatch: pytest.MonkeyPatch):
    from llava_jax.data import plan

    monkeypatch.setattr(plan, "OPEN_ROWS", 8)
    index = _random_index(seed)
    order = np.random.default_rng(seed).permutation(index.usable)
    assert pack(order, index, Size(100, 4)) == _pack_slowly(order, index, Size(100, 4), 8)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("batch", [{"batch_rows": 6}, {"batch_records": 32}], ids=str)
def test_no_row_is_overfull_and_every_epoch_holds_every_record(seed: int, batch: dict):
    index, capacity = _random_index(seed), Size(100, 3)
    plan = _plan(index, capacity, **batch, epochs=3, seed=seed, rows_multiple=2)
    assert plan.rows_per_step % 2 == 0
    assert plan.num_rows == plan.num_steps * plan.rows_per_step
    for row in _rows(plan):
        assert index.tokens[row].sum() <= capacity.tokens
        assert index.tiles[row].sum() <= capacity.tiles
        assert len(row) <= plan.most_records
    counts = np.bincount(plan.records, minlength=len(index.records))
    assert (counts[list(index.refused)] == 0).all()
    if "batch_rows" in batch:
        assert (counts[index.usable] == 3).all()
    else:
        # Refused places are taken by others: published counts hold.
        assert (counts[index.usable] >= 3).all()
        assert counts.sum() == 3 * len(index.records)


def test_each_epoch_has_an_order_of_its_own():
    index = _index([1] * 64)
    epochs = _plan(index, Size(1, 0), batch_rows=64, epochs=3).records.reshape(3, 64)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(64))
    assert len({epoch.tobytes() for epoch in epochs}) == 3
    unshuffled = _plan(index, Size(1, 0), batch_rows=64, epochs=2, shuffle=False).records.reshape(2, 64)
    np.testing.assert_array_equal(unshuffled, [np.arange(64)] * 2)


def test_a_step_holds_the_records_that_the_recipe_counts():
    index = _random_index(0)
    plan = _plan(index, batch_records=32, epochs=2, rows_multiple=4)
    counts = [
        sum(map(len, _rows(plan)[i : i + plan.rows_per_step])) for i in range(0, plan.num_rows, plan.rows_per_step)
    ]
    per_epoch = [32] * (400 // 32) + [400 % 32]
    assert counts == per_epoch * 2


@pytest.mark.parametrize(("num_records", "batch", "steps"), [(5581, 256, 22), (6653, 128, 52), (512, 256, 2)])
def test_step_counts_follow_the_published_rule(num_records: int, batch: int, steps: int):
    rng = np.random.default_rng(0)
    index = _index(rng.integers(590, 1400, num_records), np.ones(num_records), refused=range(0, num_records, 100))
    assert _plan(index, Size(2048, 3), batch_records=batch, epochs=1, rows_multiple=8).num_steps == steps


@pytest.mark.nightly
@pytest.mark.parametrize(("num_records", "batch", "steps"), [(558_128, 256, 2181), (665_298, 128, 5198)])
def test_published_recipes_have_their_published_steps(num_records: int, batch: int, steps: int):
    rng = np.random.default_rng(0)
    index = _index(rng.integers(590, 1400, num_records), np.ones(num_records))
    assert _plan(index, Size(2048, 3), batch_records=batch, epochs=1, rows_multiple=8).num_steps == steps


@pytest.mark.parametrize("batch", [{"batch_rows": 4}, {"batch_records": 20}], ids=str)
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_steps_are_as_many_as_asked_for(batch: dict, steps: int):
    assert _plan(_random_index(0), **batch, steps=steps).num_steps == steps


def test_a_longer_run_begins_as_a_shorter_one():
    index = _random_index(0)
    short, long = (_plan(index, batch_rows=4, steps=steps) for steps in (5, 50))
    assert _rows(long)[: short.num_rows] == _rows(short)


def test_the_plan_follows_from_its_inputs_alone():
    first, second = (_plan(_random_index(3), batch_rows=4, epochs=2, seed=5) for _ in range(2))
    assert first.fingerprint() == second.fingerprint()
    assert _rows(first) == _rows(second)
    for changes in ({"seed": 6}, {"batch_rows": 5}, {"shuffle": False}, {"epochs": 1}):
        other = _plan(_random_index(3), **({"batch_rows": 4, "epochs": 2, "seed": 5} | changes))
        assert other.fingerprint() != first.fingerprint()
    assert _plan(_random_index(4), batch_rows=4, epochs=2, seed=5).fingerprint() != first.fingerprint()


def test_more_devices_change_only_the_padding():
    index = _random_index(0)
    plans = [_plan(index, batch_records=32, epochs=1, rows_multiple=multiple) for multiple in (1, 2, 4, 8)]
    for plan in plans:
        assert [row for row in _rows(plan) if row] == [row for row in _rows(plans[0]) if row]
    assert len({plan.num_steps for plan in plans}) == 1


def test_a_resume_on_other_devices_finds_the_same_plan():
    """DESIGN.md: the plan depends on no host, worker or device count, and a mesh may change on resume."""
    index = _random_index(0)
    plans = [_plan(index, batch_records=32, epochs=1, rows_multiple=multiple) for multiple in (1, 8)]
    assert plans[0].fingerprint() == plans[1].fingerprint()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 1}, "batch_rows=None, batch_records=None"),
        ({"batch_rows": 4, "batch_records": 4, "epochs": 1}, "batch_rows=4, batch_records=4"),
        ({"batch_rows": 4}, "epochs=None, steps=None"),
        ({"batch_rows": 4, "epochs": 1, "steps": 1}, "epochs=1, steps=1"),
        ({"batch_rows": 6, "epochs": 1, "rows_multiple": 4}, "must be a multiple of 4"),
        ({"batch_rows": 4, "epochs": 0}, "epochs"),
        ({"batch_rows": 4, "steps": 0}, "steps"),
        ({"batch_rows": 0, "epochs": 1}, "batch_rows"),
        ({"batch_records": 0, "epochs": 1}, "batch_records"),
    ],
)
def test_settings_that_make_no_plan_are_named(changes: dict, says: str):
    with pytest.raises(ValueError, match=says) as error:
        _plan(_random_index(0, 20), **changes)
    assert "data." in str(error.value)


@pytest.mark.parametrize("changes", [{"batch_rows": 4, "epochs": -1}, {"batch_rows": -4, "steps": 2}])
def test_negative_settings_do_not_run_for_ever(changes: dict, monkeypatch: pytest.MonkeyPatch):
    from llava_jax.data import plan

    calls = itertools.count()

    def limited(*arguments):
        assert next(calls) < 50, "the planner does not end"
        return pack(*arguments)

    monkeypatch.setattr(plan, "pack", limited)
    with pytest.raises(ValueError, match="data."):
        _plan(_random_index(0, 20), **changes)


# The index and its cache.


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
        check_refusals(_index([1, 1], refused=[0, 1]), 1.0)


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


def test_weights_say_how_often_an_epoch_reads_each_record():
    index = _index(np.full(300, 1), weights=(1.0, 2.5, 0.25))
    epochs = _plan(index, Size(1, 0), batch_rows=375, epochs=2).records.reshape(2, 375)
    for epoch in epochs:
        counts = np.bincount(epoch, minlength=300)
        assert (counts[:100] == 1).all()
        assert set(counts[100:200]) == {2, 3}
        assert counts[100:200].sum() == 250
        assert set(counts[200:]) == {0, 1}
        assert counts[200:].sum() == 25
    assert (np.bincount(epochs[0], minlength=300) != np.bincount(epochs[1], minlength=300)).any()


def test_weighted_epochs_keep_their_length_when_records_are_refused():
    index = _index(np.full(300, 1), refused=range(100, 120), weights=(1.0, 2.0, 0.5))
    plan = _plan(index, Size(1, 0), batch_records=50, epochs=2)
    assert len(plan.records) == 700
    assert not np.isin(plan.records, range(100, 120)).any()


def test_a_mix_that_draws_nothing_is_refused():
    index = _index(np.full(4, 1), weights=(0.1,))
    with pytest.raises(DataError, match="Raise the weights"):
        _plan(index, Size(1, 0), batch_rows=1, steps=5)
