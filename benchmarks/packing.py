"""Packing against the original's grouping by length, on lengths like those of its data sets; a few minutes of one CPU.

python -m benchmarks.packing > benchmarks/results/packing.md

The lengths are drawn, since the data sets are not here: mix665k by its published parts (counts of the LLaVA
repository's issue 702), words of every part from a log-normal whose mean and spread are this file's guess, 1.35 tokens
a word, 576 slots a picture; and the 558k captions. So the shares below are of these guesses, which the second table
varies; `llava-jax data check` prints how real records pack.
"""

import dataclasses
import datetime
import platform

import numpy as np

from benchmarks.grouping import group_by_modality_length
from llava_jax.data.index import Index
from llava_jax.data.mix import Mix, Part, Records
from llava_jax.data.plan import Plan, make_plan
from llava_jax.data.records import RecordFile
from llava_jax.data.rows import Size

PICTURE, LENGTH, WORD = 576, 2048, 1.35
# What the template adds to every record: BOS, the system prompt, the roles of an exchange.
OPENING = 45
# Of mix665k: records, mean words, sigma of the logarithm, whether with a picture.
PARTS = {
    "LLaVA-Instruct": (157_712, 180, 0.45, True),
    "ShareGPT": (40_688, 900, 0.70, False),
    "VQAv2": (82_783, 75, 0.35, True),
    "GQA": (72_140, 130, 0.50, True),
    "OKVQA": (8_998, 25, 0.30, True),
    "OCR-VQA": (80_000, 75, 0.30, True),
    "A-OKVQA": (66_160, 40, 0.20, True),
    "TextCaps": (21_953, 45, 0.40, True),
    "RefCOCO": (48_447, 110, 0.45, True),
    "Visual Genome": (86_417, 130, 0.30, True),
}
DEVICES, PER_DEVICE = 8, 16
MESHES = ((1, 16), (1, 64), (8, 2), (8, 16), (16, 8), (32, 1), (32, 4), (64, 1), (64, 2))
ROWS = (Size(2048, 3), Size(1792, 3), Size(4096, 7))


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of every record its tokens in a row, its words as the original counts them, and whether it has a picture."""

    tokens: np.ndarray
    words: np.ndarray
    has_picture: np.ndarray


def mix665k(rng: np.random.Generator, stretch: float = 1.0) -> Lengths:
    """`stretch` multiplies the words of every part."""
    parts = []
    for count, mean, sigma, has_picture in PARTS.values():
        words = stretch * mean * np.exp(sigma * rng.standard_normal(count) - sigma**2 / 2)
        parts.append((words, np.full(count, has_picture)))
    words, has_picture = map(np.concatenate, zip(*parts, strict=True))
    return _lengths(words, has_picture, OPENING)


def captions558k(rng: np.random.Generator) -> Lengths:
    words = 10 * np.exp(0.45 * rng.standard_normal(558_128))
    return _lengths(words, np.ones(558_128, bool), 2)


def _lengths(words: np.ndarray, has_picture: np.ndarray, opening: int) -> Lengths:
    words = np.maximum(words, 1).astype(np.int64)
    tokens = (WORD * words).astype(np.int64) + opening + PICTURE * has_picture
    # `lengths` of the original's dataset adds 128 for a picture, `modality_lengths`, which grouping uses, nothing.
    return Lengths(np.minimum(tokens, LENGTH), words, has_picture)


def padded(lengths: Lengths, order: np.ndarray, per_device: int) -> tuple[int, int, int]:
    """Steps, slots, and slots if every device takes as long as the one with the longest record of the step.

    The collator pads each device's records to their longest; the devices of a step wait for each other.
    """
    step = DEVICES * per_device
    steps = -(-len(order) // step)
    tokens = np.zeros(steps * step, np.int64)
    tokens[: len(order)] = lengths.tokens[order]
    longest = tokens.reshape(steps, DEVICES, per_device).max(axis=2)
    return steps, int(longest.sum()) * per_device, int(longest.max(axis=1).sum()) * step


def packed(lengths: Lengths, capacity: Size, **batch: int | None) -> tuple[int, int, int, int]:
    """Steps, slots, real tokens and most records of a row of our plan, padding rows and the last step included."""
    plan = planned(lengths, capacity, DEVICES, **batch)
    # The last rows of an epoch may not fill a step; every row takes its slots.
    real = int(np.minimum(lengths.tokens, capacity.tokens).sum())
    return plan.num_steps, plan.num_rows * capacity.tokens, real, plan.most_records


def planned(lengths: Lengths, capacity: Size, rows_multiple: int, **batch: int | None) -> Plan:
    """One epoch's rows."""
    count, tokens = len(lengths.tokens), np.minimum(lengths.tokens, capacity.tokens)
    file = RecordFile("drawn", np.zeros((count, 2), np.int64))
    index = Index(
        records=Records(Mix(parts=(Part(source="drawn"),)), (file,)),
        tokens=tokens.astype(np.int32),
        tiles=lengths.has_picture.astype(np.int32),
        refused={},
        fingerprint="",
    )
    settings = {"batch_rows": None, "batch_records": None} | batch
    return make_plan(
        index, capacity, seed=0, shuffle=True, epochs=1, steps=None, rows_multiple=rows_multiple, **settings
    )


def skipped(lengths: Lengths, devices: int, accumulation: int) -> str:
    """What is left of a recipe's steps on so many devices when micro-batches without a record are skipped."""
    capacity = ROWS[0]
    plan = planned(lengths, capacity, devices * accumulation, batch_records=DEVICES * PER_DEVICE)
    computed = plan.rows_computed(accumulation)
    real, at_a_time = int(lengths.tokens.sum()) / capacity.tokens, plan.rows_per_step // accumulation // devices
    return (
        f"| {devices} | {accumulation} | {at_a_time} | {plan.rows_per_step} | {computed.mean():.1f} | "
        f"{real / plan.num_rows:.1%} | {real / computed.sum():.1%} |"
    )


def _rows(name: str, lengths: Lengths, per_device: int, *, grouped: bool) -> list[str]:
    rng = np.random.default_rng(1)
    if not grouped:
        order = rng.permutation(len(lengths.tokens))
    else:
        words = np.where(lengths.has_picture, lengths.words, -lengths.words).tolist()
        order = np.array(group_by_modality_length(words, per_device, DEVICES, lambda n: rng.permutation(n).tolist()))
    steps, slots, waiting = padded(lengths, order, per_device)
    records = DEVICES * per_device
    how = "group_by_modality_length" if grouped else "random batches"
    real = int(lengths.tokens.sum())
    found = [
        (f"original: {how}, {records} records", steps, slots, real, 1),
        ("its devices waiting for each other", steps, waiting, real, 1),
    ]
    for capacity in ROWS:
        shape = f"rows of {capacity.tokens} tokens, {capacity.tiles} tiles"
        # As many rows as the original's steps have slots on average: the same work a step.
        rows = max(1, round(waiting / steps / capacity.tokens / DEVICES)) * DEVICES
        found.append((f"{shape}, `batch_records={records}`", *packed(lengths, capacity, batch_records=records)))
        found.append((f"{shape}, `batch_rows={rows}`", *packed(lengths, capacity, batch_rows=rows)))
    return [
        f"| {name} | {what} | {number:,} | {taken // number:,} | {taken:,} | {used / taken:.1%} | {most} |"
        for what, number, taken, used, most in found
    ]


def main() -> None:
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    print(f"# Packing against grouping by length\n\n{__doc__}")
    print(
        f"{datetime.date.today()}, {versions}, {platform.machine()} CPU, {DEVICES} devices of {PER_DEVICE} records.\n"
    )
    print("Slots are all that a step computes; real is the share of them that is not padding. `batch_rows` takes about")
    print("the original's slots a step, so fewer steps are less work; `batch_records` keeps the published steps, each")
    print(
        "padded to the fullest of the epoch. In rows of 1792 the few longer records would be refused or cut; here they"
    )
    print("are cut.")
    head = "\n| lengths | batches | steps | slots a step | slots an epoch | real | most records of a row |\n"
    head += "|---|---|---|---|---|---|---|"
    print(head)
    mix = mix665k(np.random.default_rng(0))
    print("\n".join(_rows("mix665k", mix, PER_DEVICE, grouped=True)), flush=True)
    captions = captions558k(np.random.default_rng(0))
    print("\n".join(_rows("558k captions", captions, 32, grouped=False)), flush=True)
    print("\nA step of 128 records of the mix in rows of 2048, on more and fewer devices. `accumulation` cuts its rows")
    print("into micro-batches; those without a record are skipped.\n")
    print("| devices | accumulation | at a time on a device | rows | rows computed | real of all | real of computed |")
    print("|---|---|---|---|---|---|---|")
    for devices, accumulation in MESHES:
        print(skipped(mix, devices, accumulation), flush=True)
    print(head)
    for stretch in (0.5, 2.0):
        lengths = mix665k(np.random.default_rng(0), stretch)
        print("\n".join(_rows(f"mix665k, words x{stretch}", lengths, PER_DEVICE, grouped=True)), flush=True)


if __name__ == "__main__":
    main()
