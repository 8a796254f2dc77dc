"""The order in which the original trains on records: grouped by modality and length, not packed.

Lists of record numbers come out as `LengthGroupedSampler` of the original (`llava/train/llava_trainer.py`, c121f04)
gives them. Of a megabatch, `num_shards` batches of `batch_size` records, every shard (a device, or one of its
accumulated micro-batches) takes one batch in turn. Random orders come from the caller.
"""

from collections.abc import Callable, Sequence

Permute = Callable[[int], Sequence[int]]


def group_by_modality_length(lengths: Sequence[int], batch_size: int, num_shards: int, permute: Permute) -> list[int]:
    """Megabatches of one modality each, in random order; what is left of both modalities comes last, in order.

    `lengths` is positive for a record with a picture and negative without. Among text alone the shortest come first
    and a shard's total is a negative sum: the original groups the signed lengths where all records are alike.

    Raises:
      ValueError: a length of 0 has no modality.
    """
    if not all(lengths):
        raise ValueError(f"lengths must not be 0; record {list(lengths).index(0)} is. Leave it out.")
    kinds = [[i for i, length in enumerate(lengths) if (length > 0) == shown] for shown in (True, False)]
    if not all(kinds):
        return group_by_length(lengths, batch_size, num_shards, permute)
    whole, left = [], []
    for records in kinds:
        sizes = [abs(lengths[i]) for i in records]
        order = [records[i] for i in group_by_length(sizes, batch_size, num_shards, permute)]
        *full, last = _cut(order, batch_size * num_shards)
        whole += full
        left += last
    return [record for i in permute(len(whole)) for record in whole[i]] + sorted(left)


def group_by_length(lengths: Sequence[int], batch_size: int, num_shards: int, permute: Permute) -> list[int]:
    """A random order, cut into megabatches, each sorted by falling length and dealt to the shards."""
    order = []
    for megabatch in _cut(permute(len(lengths)), batch_size * num_shards):
        falling = sorted(map(int, megabatch), key=lambda i: lengths[i], reverse=True)
        order += [record for chunk in split_evenly(falling, lengths, num_shards) for record in chunk]
    return order


def split_evenly(records: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Chunks of equal counts and about equal totals: each record in turn goes to the smallest that is not full.

    Records that do not divide evenly are dealt like cards, whatever their lengths.

    Example, lengths [9, 5, 3, 1], two chunks:
        [0, 1, 2, 3]   ->   [[0, 3], [1, 2]]
    """
    if len(records) % num_chunks:
        return [list(records[i::num_chunks]) for i in range(num_chunks)]
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for record in records:
        smallest = totals.index(min(totals))
        chunks[smallest].append(record)
        totals[smallest] += lengths[record]
        if len(chunks[smallest]) == len(records) // num_chunks:
            totals[smallest] = float("inf")
    return chunks


def _cut(order: Sequence[int], size: int) -> list[Sequence[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]
