"""Grouping by modality and length, beside the recorded orders that the conformance run follows."""

import numpy as np
import pytest

from benchmarks.grouping import group_by_modality_length, split_evenly


def test_chunks_get_equal_counts_and_about_equal_totals():
    assert split_evenly([0, 1, 2, 3], [9, 5, 3, 1], 2) == [[0, 3], [1, 2]]
    assert split_evenly([4, 2, 0], [1, 1, 1, 1, 1], 2) == [[4, 0], [2]]


def test_batches_hold_one_modality_until_the_end():
    rng = np.random.default_rng(0)
    lengths = (rng.integers(1, 50, 100) * rng.choice([1, -1], 100)).tolist()
    order = group_by_modality_length(lengths, 2, 4, lambda count: rng.permutation(count).tolist())
    assert sorted(order) == list(range(100))
    left = sum(sum((length > 0) == shown for length in lengths) % 8 or 8 for shown in (True, False))
    for at in range(0, 100 - left, 8):
        assert len({lengths[i] > 0 for i in order[at : at + 8]}) == 1
    assert order[-left:] == sorted(order[-left:])


def test_a_record_without_words_is_refused():
    with pytest.raises(ValueError, match="record 1 is"):
        group_by_modality_length([3, 0], 1, 1, lambda count: range(count))
