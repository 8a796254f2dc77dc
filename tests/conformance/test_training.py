"""Training: the original's trajectories followed step by step, its schedule, and its samplers."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.grouping import group_by_length, group_by_modality_length, split_evenly
from llava_jax.convert.checkpoint import open_checkpoint
from llava_jax.convert.layouts import change_layout, our_name
from llava_jax.models.parameters import bind, part
from llava_jax.train.config import OptimConfig
from llava_jax.train.objectives import next_token
from llava_jax.train.optim import cosine_factor, make_optimizer, make_schedule
from llava_jax.train.step import make_step
from tests.conformance.recorded_model import PLAIN, Recorded, lay_out, open_recorded, to_batch, widen_labels
from tests.conformance.report import Case, expect_fields, reads

COMPANIONS = ("training/*.npz", "training/*.bin", "training/init/*")
LOSS, NORM, WEIGHTS = 1e-4, 1e-3, 1e-4
# What learns in each stage of the recording.
TRAINABLE = {"stage1": ("projector",), "stage2": ("decoder", "projector", "image_newline")}


@reads("training/trajectories.json")
def test_trajectory(case: Case, request: pytest.FixtureRequest):
    expect_fields(
        case.record, "loss", "grad_norm", "lr", "micro_losses", "param_group_weight_decay", "param_group_sizes",
        "settings", "final_parameter_stats", "fp32_vs_fp64",
    )  # fmt: skip
    folder, settings = case.root / "training", case.record["settings"]
    expect_fields(
        settings, "lr", "weight_decay", "betas", "eps", "mm_projector_lr", "grad_accumulation", "optimizer_steps",
        "warmup_ratio", "warmup_steps", "schedule", "max_grad_norm", "optimizer",
    )  # fmt: skip
    rate = settings["mm_projector_lr"]
    config = OptimConfig(
        learning_rate=settings["lr"],
        part_learning_rates={} if rate is None else {"projector": rate},
        warmup_ratio=settings["warmup_ratio"],
        weight_decay=settings["weight_decay"],
        clip_norm=settings["max_grad_norm"] or None,
        b1=settings["betas"][0],
        b2=settings["betas"][1],
        eps=settings["eps"],
    )
    steps, accumulation = settings["optimizer_steps"], settings["grad_accumulation"]
    if accumulation > 1:
        request.getfixturevalue("under_original")("a mean of micro-batch means where we divide once")
    assert settings["schedule"].startswith("cosine to 0")
    assert settings["optimizer"] == "torch.optim.AdamW"
    recorded = open_recorded(folder / "init")
    params = dict(recorded.model.params)
    stage = case.name.partition("_")[0]
    learns = TRAINABLE[stage]
    if stage == "stage2":
        start = open_checkpoint(str(folder / "stage1_mm_projector.bin")).params
        params |= {name: jnp.asarray(np.asarray(value)) for name, value in start.items()}
    trainable = {name: value for name, value in params.items() if part(name) in learns}
    frozen = {name: value for name, value in params.items() if name not in trainable}
    _check_groups(case.record, config, trainable)
    batches = _batches(recorded, folder)
    assert len(batches) == steps * accumulation
    trainable = _follow(case.record, recorded, trainable, frozen, batches, config)
    with np.load(folder / "final_weights.npz") as final:
        for key in [key for key in final if key.startswith(f"{case.name}/")]:
            _same(trainable, key.removeprefix(f"{case.name}/"), final[key])
    for key, stats in case.record.get("final_parameter_stats", {}).items():
        expect_fields(stats, "sum", "l2", "abs_max")
        found = np.asarray(trainable[_known(key)[0]], np.float64)
        # Weights that are right to 1e-4 give these.
        assert abs(found.sum() - stats["sum"]) <= WEIGHTS * found.size, key
        assert abs(np.sqrt((found**2).sum()) - stats["l2"]) <= WEIGHTS * np.sqrt(found.size), key
        assert abs(np.abs(found).max() - stats["abs_max"]) <= WEIGHTS, key


def _check_groups(record: dict[str, Any], config: OptimConfig, trainable: dict[str, Any]) -> None:
    """What decays and what has a rate of its own, in the groups of the original's optimizer."""
    apart = "projector" in config.part_learning_rates
    groups = [(own, decays) for own in ((False, True) if apart else (False,)) for decays in (True, False)]
    found = [(apart and part(name) == "projector", not name.endswith((".bias", ".scale"))) for name in trainable]
    assert record["param_group_sizes"] == [found.count(group) for group in groups]
    assert record["param_group_weight_decay"] == [config.weight_decay * decays for _, decays in groups]
    steps = record["settings"]["optimizer_steps"]
    factor = np.array([make_schedule(config, steps)(step) for step in range(steps)]) / config.learning_rate
    rates = [config.part_learning_rates["projector"] if own else config.learning_rate for own, _ in groups]
    np.testing.assert_allclose(np.array(record["lr"]) / rates, factor[:, None] * np.ones(len(rates)), atol=1e-6)


def _batches(recorded: Recorded, folder: Path) -> list[dict[str, Any]]:
    """Every recorded batch in the same static shape."""
    with np.load(folder / "batches.npz") as file:
        recordings = dict(file)
    batches = []
    for ids, labels, mask, index, length in zip(
        *(recordings[name] for name in ("input_ids", "labels", "attention_mask", "image_index", "batch_length")),
        strict=True,
    ):
        ids, labels, mask = ids[:, :length], labels[:, :length], mask[:, :length]
        # A row of text alone gets a picture of zeros in the original, which nothing reads.
        pictures = [recordings["pixel_values"][max(0, i)] for i in index]
        side = recorded.config.vision.image_size
        prompts = lay_out(recorded, ids, mask, pictures, [(side, side)] * len(pictures))
        batches.append(to_batch(prompts, widen_labels(ids, labels, mask, prompts)))
    longest = max(batch["tokens"].shape[1] for batch in batches)
    tiles = max(batch["images"].shape[1] for batch in batches)
    return [_padded(batch, longest, tiles) for batch in batches]


def _padded(batch: dict[str, Any], length: int, tiles: int) -> dict[str, Any]:
    """The batch with more padding; what lands nowhere keeps a slot of its own past the row's end."""
    b, t = batch["tokens"].shape
    out = {name: np.asarray(value) for name, value in batch.items()}
    p = max(out["patch_slots"].shape[2], 16)
    slots = length + np.tile(np.arange(tiles * p, dtype=np.int32), (b, 1)).reshape(b, tiles, p)
    old = out["patch_slots"]
    if old.size:
        slots[:, : old.shape[1]] = np.where(old < t, old, slots[:, : old.shape[1]])
    out["patch_slots"] = slots
    images = np.zeros((b, tiles, *out["images"].shape[2:]), np.uint8)
    images[:, : out["images"].shape[1]] = out["images"]
    out["images"] = images
    for name in ("tokens", "positions", "segment_ids", "targets", "is_target"):
        out[name] = np.pad(out[name], [(0, 0), (0, length - t)])
    return {name: jnp.asarray(value) for name, value in out.items()}


def _follow(
    record: dict[str, Any],
    recorded: Recorded,
    trainable: dict[str, Any],
    frozen: dict[str, Any],
    batches: list[dict[str, Any]],
    config: OptimConfig,
) -> dict[str, Any]:
    """Trains over the batches, and compares loss and norm at every step."""
    accumulation, steps = record["settings"]["grad_accumulation"], record["settings"]["optimizer_steps"]
    optimizer = make_optimizer(config, steps)
    state = optimizer.init(trainable)
    graphdef = recorded.model.graphdef
    step = jax.jit(make_step(graphdef, next_token, optimizer, context=PLAIN, accumulation=1, compute_dtype=jnp.float32))

    @jax.jit
    @jax.value_and_grad
    def mean_loss(trainable: dict[str, Any], frozen: dict[str, Any], batch: dict[str, Any]) -> jax.Array:
        sums = next_token(bind(graphdef, trainable | frozen), batch, PLAIN)
        return sums.loss / jnp.maximum(sums.weight, 1.0)

    micro: list[float] = []
    for number in range(steps):
        if accumulation == 1:
            trainable, state, metrics = step(trainable, frozen, state, batches[number])
            micro.append(float(metrics["loss"]))
            loss, norm = micro[-1], float(metrics["grad_norm"])
        else:
            found = [
                mean_loss(trainable, frozen, batch)
                for batch in batches[number * accumulation : (number + 1) * accumulation]
            ]
            gradients = jax.tree.map(lambda *values: sum(values) / accumulation, *(g for _, g in found))
            micro += [float(value) for value, _ in found]
            loss, norm = float(np.mean(micro[-accumulation:])), float(optax.tree.norm(gradients))
            updates, state = optimizer.update(gradients, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        assert abs(loss - record["loss"][number]) <= LOSS, number
        assert abs(norm - record["grad_norm"][number]) <= NORM * record["grad_norm"][number], number
    np.testing.assert_allclose(micro, record["micro_losses"], atol=LOSS, rtol=0)
    return trainable


def _same(trainable: dict[str, Any], key: str, wanted: np.ndarray) -> None:
    name, kind = _known(key)
    difference = np.abs(np.asarray(trainable[name]) - change_layout(wanted, kind))
    assert difference.max() <= WEIGHTS, key


def _known(key: str) -> tuple[str, Any]:
    found = our_name(key)
    assert found is not None, key
    return found


@reads("training/lr_schedule.json")
def test_schedule(case: Case):
    record = case.record
    expect_fields(record, "total_steps", "warmup_ratio", "warmup_steps", "lr_factor_used_at_step", "after_last")
    factor = jax.jit(jax.vmap(cosine_factor(record["total_steps"], record["warmup_ratio"])))
    wanted = np.array([*record["lr_factor_used_at_step"], record["after_last"]])
    np.testing.assert_allclose(factor(jnp.arange(len(wanted))), wanted, atol=1e-6)


def _sampler_cases(path: Path) -> list[tuple[str, Any]]:
    content = json.loads(path.read_text())
    expect_fields(content, "group_by_modality", "split_to_even_chunks")
    return [
        (f"{name}-{i}", {"kind": name} | record)
        for name, records in content.items()
        for i, record in enumerate(records)
    ]


@reads("training/samplers.json", cases=_sampler_cases)
def test_sampler(case: Case):
    record = case.record
    if record["kind"] == "split_to_even_chunks":
        expect_fields(record, "kind", "indices", "lengths", "num_chunks", "chunks")
        assert split_evenly(record["indices"], record["lengths"], record["num_chunks"]) == record["chunks"]
        return
    expect_fields(
        record, "kind", "lengths", "batch_size", "world_size", "error", "permutations_drawn", "modality_grouped",
        "permutations_drawn_length_grouped", "length_grouped_of_abs",
    )  # fmt: skip
    lengths, shape = record["lengths"], (record["batch_size"], record["world_size"])
    if record["error"] is not None:
        with pytest.raises(ValueError, match="must not be 0"):
            group_by_modality_length(lengths, *shape, _drawn(record["permutations_drawn"]))
    else:
        permute = _drawn(record["permutations_drawn"])
        assert group_by_modality_length(lengths, *shape, permute) == record["modality_grouped"]
        assert not permute.keywords["draws"], "the original drew more often"
    if "length_grouped_of_abs" in record:
        permute = _drawn(record["permutations_drawn_length_grouped"])
        assert group_by_length([abs(length) for length in lengths], *shape, permute) == record["length_grouped_of_abs"]


def _drawn(permutations: list[list[int]]) -> functools.partial[list[int]]:
    """The recorded draws, in order."""
    return functools.partial(_draw, draws=list(permutations))


def _draw(count: int, *, draws: list[list[int]]) -> list[int]:
    drawn = draws.pop(0)
    assert len(drawn) == count
    return drawn
