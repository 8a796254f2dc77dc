"""Packing, published step counts, weights of a mix; what the plan depends on."""

import itertools

import numpy as np
import pytest

from llava_jax.data.index import Index
from llava_jax.data.mix import Mix, Part, Records
from llava_jax.data.plan import Plan, make_plan, pack
from llava_jax.data.records import RecordFile
from llava_jax.data.rows import Size
from llava_jax.errors import DataError

CAPACITY = Size(100, 3)


def _records(num_records: int, weights: tuple[float, ...] = (1.0,)) -> Records:
    """Parts of equal length that lie nowhere."""
    parts = tuple(Part(source="none.json", weight=weight) for weight in weights)
    spans = np.zeros((num_records // len(weights), 2), np.int64)
    return Records(Mix(parts=parts), tuple(RecordFile("none.json", spans) for _ in parts))


def make_index(tokens, tiles=None, refused=(), weights=(1.0,)) -> Index:
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
    return make_index(rng.integers(1, 100, num_records), rng.integers(0, 4, num_records), refused)


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
    assert pack([0, 1, 2], make_index([6, 5, 4]), Size(10, 0)) == [[0, 2], [1]]


def test_tiles_limit_a_row_as_tokens_do():
    index = make_index([4, 1, 1, 1], [2, 2, 1, 1])
    assert pack(range(4), index, Size(10, 3)) == [[0, 2], [1, 3]]


def test_the_oldest_of_equally_full_rows_is_taken():
    assert pack(range(5), make_index([6, 6, 6, 4, 4]), Size(10, 0)) == [[0, 3], [1, 4], [2]]


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
    index = make_index([1] * 64)
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


def test_rows_are_computed_up_to_the_last_that_holds_a_record():
    """Steps of 10 and 6 full rows, padded to 16, on 4 devices: in 1, 2 and 4 micro-batches."""
    plan = _plan(make_index([1] * 16), Size(1, 0), batch_records=10, epochs=1, rows_multiple=16)
    assert plan.rows_per_step == 16
    for accumulation, expected in ((1, [16, 16]), (2, [16, 8]), (4, [12, 8])):
        np.testing.assert_array_equal(plan.rows_computed(accumulation), expected)


@pytest.mark.parametrize(("num_records", "batch", "steps"), [(5581, 256, 22), (6653, 128, 52), (512, 256, 2)])
def test_step_counts_follow_the_published_rule(num_records: int, batch: int, steps: int):
    rng = np.random.default_rng(0)
    index = make_index(rng.integers(590, 1400, num_records), np.ones(num_records), refused=range(0, num_records, 100))
    assert _plan(index, Size(2048, 3), batch_records=batch, epochs=1, rows_multiple=8).num_steps == steps


@pytest.mark.nightly
@pytest.mark.parametrize(("num_records", "batch", "steps"), [(558_128, 256, 2181), (665_298, 128, 5198)])
def test_published_recipes_have_their_published_steps(num_records: int, batch: int, steps: int):
    rng = np.random.default_rng(0)
    index = make_index(rng.integers(590, 1400, num_records), np.ones(num_records))
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


def test_weights_say_how_often_an_epoch_reads_each_record():
    index = make_index(np.full(300, 1), weights=(1.0, 2.5, 0.25))
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
    index = make_index(np.full(300, 1), refused=range(100, 120), weights=(1.0, 2.0, 0.5))
    plan = _plan(index, Size(1, 0), batch_records=50, epochs=2)
    assert len(plan.records) == 700
    assert not np.isin(plan.records, range(100, 120)).any()


def test_a_mix_that_draws_nothing_is_refused():
    index = make_index(np.full(4, 1), weights=(0.1,))
    with pytest.raises(DataError, match="Raise the weights"):
        _plan(index, Size(1, 0), batch_rows=1, steps=5)
