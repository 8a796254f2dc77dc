"""Whether a config fits devices that are not here, and the least that a step of it must cost."""

import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from llava_jax import targets
from llava_jax.chips import GIB, GPU_SHARE, GPUS, TPUS, Chip
from llava_jax.collectives import Collective, read_collectives
from llava_jax.data.plan import check_batch
from llava_jax.data.rows import Needs
from llava_jax.errors import UserError
from llava_jax.footprint import estimate, shard_bytes
from llava_jax.shapes import LlavaConfig
from llava_jax.train.config import TrainConfig, apply_override
from llava_jax.train.flops import CONVENTION, executed_flops, model_flops
from llava_jax.train.optim import make_optimizer
from llava_jax.train.sharding import batch_sharding, make_mesh, mesh_sizes, num_batch_shards
from llava_jax.train.state import Layout
from llava_jax.train.step import REMAT, abstract_tallies, jit_step

# Neither the memory nor the time of a step depends on how many of them there are.
NUM_STEPS = 1000
# Of a row that has no more tiles: LLaVA's mix, as drawn in benchmarks/packing.py, in rows of 2,048 slots.
MOST_RECORDS = 4
# Compilations that the search for something that fits may take.
MAX_TRIES = 4


class Job(NamedTuple):
    """A config on devices: what its step is compiled from."""

    config: TrainConfig
    layout: Layout
    batch: dict[str, jax.ShapeDtypeStruct]

    @property
    def num_rows(self) -> int:
        return self.batch["tokens"].shape[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step of a config takes on a topology; bytes are those of one device, FLOPs those of the whole job."""

    topology: str
    num_devices: int
    mesh: dict[str, int]
    method: str
    fits: bool
    bytes_per_chip: dict[str, int]
    hbm_bytes: int
    batch: dict[str, int]
    flops: int
    executed_flops: int
    collectives: list[dict[str, Any]]
    step_seconds_lower_bound: dict[str, float]
    mfu_ceiling: float
    assumptions: list[str]
    suggestion: dict[str, Any] | None


def plan(config: TrainConfig, topology: str) -> Plan:
    """Compiles the train step for a TPU topology such as `v5e:16x16`, or for GPUs such as `h100:8`.

    Without a compiler for GPUs it is tabulated for them, and says why. Where there is no GPU, JAX_PLATFORMS must be
    cpu, as the command line sets it.

    Raises:
      UserError: an unknown topology, a mesh or batch that does not divide, or libtpu is not installed.
    """
    topology = topology.lower()
    kind, _, size = topology.partition(":")
    is_gpu = kind in GPUS and re.fullmatch(r"[1-9]\d*", size)
    if is_gpu or (kind in TPUS and re.fullmatch(r"\d+(x\d+)+", size)):
        chip, devices = (TPUS | GPUS)[kind], _devices(topology)
        job = _job(config, devices)
        result = (_tabulate if isinstance(devices, int) else _compile)(job, topology, chip)
        return result if result.fits else dataclasses.replace(result, suggestion=_suggest(job, result, chip))
    known = ", ".join([f"{name}:4x4" for name in TPUS] + [f"{name}:8" for name in GPUS])
    raise UserError(f"--topology must be like one of {known} (any size); got {topology!r}.")


def _devices(topology: str) -> list[Any] | int:
    """Devices that a compiler on this machine knows, or the number of those that are only counted."""
    kind, _, size = topology.partition(":")
    if kind in TPUS:
        return targets.tpus(topology)
    return int(size) if targets.no_gpu_compiler(kind) else targets.gpus(kind, int(size))


def _job(config: TrainConfig, devices: list[Any] | int) -> Job:
    """What is planned, on devices as `_devices` gives them."""
    try:
        if isinstance(devices, int):
            sizes = mesh_sizes(config.mesh, devices)
            mesh: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        else:
            mesh = make_mesh(config.mesh, devices)
        layout = Layout(config, make_optimizer(config.optim, NUM_STEPS), mesh)
        rows = _num_rows(config, num_batch_shards(mesh))
    except ValueError as error:
        raise UserError(str(error)) from None
    sharding = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((rows, *value.shape), value.dtype, sharding=sharding)
        for name, value in _empty_row(config).items()
    }
    return Job(config, layout, batch)


def _num_rows(config: TrainConfig, shards: int) -> int:
    """Rows of a step: as configured, or one per record, rounded up so that all devices have the same number."""
    data, multiple = config.data, shards * config.accumulation
    check_batch(batch_rows=data.batch_rows, batch_records=data.batch_records, epochs=data.epochs, steps=data.steps)
    if data.batch_rows is None:
        return math.ceil((data.batch_records or 0) / multiple) * multiple
    if data.batch_rows % multiple:
        raise UserError(
            f"data.batch_rows must be a multiple of devices that share a batch x accumulation, {shards} x "
            f"{config.accumulation}; got {data.batch_rows}. Change it, mesh.tensor or accumulation."
        )
    return data.batch_rows


def _empty_row(config: TrainConfig) -> Mapping[str, np.ndarray]:
    model = config.model
    slots = model.num_features if isinstance(model, LlavaConfig) else model.vision.num_patches
    # A row without examples asks its tokenizer for nothing but the id that fills it.
    tokenizer: Any = SimpleNamespace(eos_id=0)
    needs = Needs(tokenizer=tokenizer, image_root="", image_size=model.vision.image_size, num_features=slots)
    return config.data.rows.assemble([], needs)


def _compile(job: Job, topology: str, chip: Chip) -> Plan:
    """The plan as the devices' compiler finds it."""
    print(f"compiling for {topology}", file=sys.stderr, flush=True)
    most = max(MOST_RECORDS, getattr(job.config.data.rows, "tiles", 0))
    step = jit_step(job.layout, make_optimizer(job.config.optim, NUM_STEPS), most_records=most)
    assert isinstance(job.layout.mesh, Mesh), "a step is compiled for devices"
    tallies, votes = abstract_tallies(job.layout.mesh, job.num_rows)
    arguments = shard_bytes((job.layout.memory, job.batch))
    try:
        compiled = targets.compile_absent(step, *job.layout.memory, job.batch | tallies, votes)
    except jax.errors.JaxRuntimeError as error:
        size = too_large(str(error), arguments)
        if size is None:
            raise
        return _report(job, topology, chip, fits=False, size=size, collectives=[])
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, "a compiler says what it allocates"
    assert text is not None, "a compiler gives its text"
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]
    if job.config.stacked:
        # A save takes the layers of what is trained apart (`saved_trees`), while no step runs.
        parts["saving"] = shard_bytes((job.layout.disk[0], job.layout.disk[2]))
        total = max(total, arguments + parts["saving"])
    # The compiler has let pass what, all parts added, is half a GiB more than a chip has; one for GPUs refuses nothing.
    size = parts | {"total": total, "headroom": chip.usable_bytes - total}
    collectives = read_collectives(text, dict(job.layout.mesh.shape))
    return _report(job, topology, chip, fits=total <= chip.usable_bytes, size=size, collectives=collectives)


def too_large(message: str, arguments: int) -> dict[str, int] | None:
    """What a step would take by the compiler's refusal; None if that is not why it refused.

    What the compiler calls temporaries there has the arguments in it.

    Example, arguments being 5 GiB:
        "... HLO temporaries (26.04G) exceeds available HBM (15.75G)."   ->   21.04 GiB beside them, -10.29 of headroom
    """
    quantity = r"([\d.]+)([KMGT])"
    found = re.search(
        rf"(?:Used {quantity} of|HLO temporaries \({quantity}\) exceeds available HBM) \(?{quantity}", message
    )
    if found is None:
        return None
    words = [word for word in found.groups() if word]
    total, usable = (int(float(words[i]) * 1024 ** "_KMGT".index(words[i + 1])) for i in (0, 2))
    return {"arguments": arguments, "temporaries": total - arguments, "total": total, "headroom": usable - total}


def _report(
    job: Job, topology: str, chip: Chip, *, fits: bool, size: dict[str, int], collectives: list[Collective]
) -> Plan:
    config, mesh = job.config, job.layout.mesh
    flops = model_flops(job.layout, job.batch)
    executed = executed_flops(job.layout, job.batch, REMAT[config.remat])
    # State is read and written once at the least, and so is what the batch brings.
    touched = size["arguments"] + size.get("outputs", 0)
    bound = {
        "compute": executed / (mesh.size * chip.flops),
        "memory": touched / chip.memory,
        "links": sum(collective.link_bytes for collective in collectives) / chip.link,
    }
    bound["seconds"] = max(bound.values())
    return Plan(
        topology=topology,
        num_devices=mesh.size,
        mesh=dict(mesh.shape),
        method=_method(job),
        fits=fits,
        bytes_per_chip=size,
        hbm_bytes=chip.hbm_bytes,
        batch=_batch_summary(job),
        flops=flops,
        executed_flops=executed,
        collectives=[collective._asdict() for collective in collectives],
        step_seconds_lower_bound=bound,
        mfu_ceiling=flops / (mesh.size * chip.flops * bound["seconds"]),
        assumptions=_assumptions(job, topology, fits=fits),
        suggestion=None,
    )


def _method(job: Job) -> str:
    mesh = job.layout.mesh
    version = targets.compiler_version(mesh.devices.flat[0].platform) if isinstance(mesh, Mesh) else None
    return f"compiled by {version}, jax {jax.__version__}" if version else "analytic"


def _tabulate(job: Job, topology: str, chip: Chip) -> Plan:
    """The plan by arithmetic, for devices without a compiler here."""
    parts, collectives = estimate(job.layout, job.batch)
    total = sum(parts.values())
    size = parts | {"total": total, "headroom": chip.usable_bytes - total}
    report = _report(job, topology, chip, fits=total <= chip.usable_bytes, size=size, collectives=collectives)
    assumptions = [
        "analytic: no compiler was asked; state is exact, temporaries are sums of the largest arrays, and what the "
        "compiler fuses or copies may change them by a fifth or more",
        f"no compiler: {targets.no_gpu_compiler(topology.partition(':')[0])}",
        *report.assumptions,
    ]
    return dataclasses.replace(report, assumptions=assumptions)


def _batch_summary(job: Job) -> dict[str, int]:
    shards = num_batch_shards(job.layout.mesh)
    return {
        "rows": job.num_rows,
        "tokens": int(np.prod(job.batch["tokens"].shape)),
        "accumulation": job.config.accumulation,
        "rows_per_chip_at_a_time": job.num_rows // shards // job.config.accumulation,
    }


def _assumptions(job: Job, topology: str, *, fits: bool) -> list[str]:
    said = [f"flops: {CONVENTION}"]
    data = job.config.data
    if data.batch_rows is None and data.batch_records is not None:
        said.append(
            f"one row per record, as no index of the data is read: {data.batch_records} records in {job.num_rows} rows"
            + (f", {job.num_rows - data.batch_records} of them padding" if job.num_rows > data.batch_records else "")
            + "; packed records need fewer rows, and micro-batches without any are skipped"
        )
    said += [
        "step_seconds_lower_bound: no step can be faster than the largest of its parts at published peaks, with all "
        "else hidden behind it; it is no estimate of what a step takes",
        "compute: the FLOPs above and what the backward pass computes again; memory: arguments and results once; "
        "links: what a device receives, through all of its links at once",
    ]
    if topology.partition(":")[0] in GPUS:
        said.append(
            f"headroom: XLA_PYTHON_CLIENT_MEM_FRACTION={GPU_SHARE}, by itself JAX takes 0.75; no kernel was timed, "
            "and other kernels may need more; cuDNN's attention as in a run whose trial of it succeeds"
        )
    if not fits:
        said.append("it does not fit: where the compiler refused it, collectives are unknown and their time is zero")
    return said


def _candidates(config: TrainConfig, shards: int) -> list[tuple[str, ...]]:
    """Changes that save memory and alter no number of the run but rounding, the cheapest first."""
    rows = _num_rows(config, shards) // shards
    found: list[tuple[str, ...]] = []
    steps: tuple[str, ...] = ()
    if config.remat != "everything":
        steps = (*steps, "remat=everything")
        found.append(steps)
    for accumulation in (n for n in range(config.accumulation + 1, rows + 1) if rows % n == 0):
        found.append((*steps, f"accumulation={accumulation}"))
    last = found[-1] if found else ()
    if config.mesh.data > 1:
        found.append((*last, "mesh.data=1", "mesh.fsdp=-1"))
    found += [(*last, "mesh.data=1", "mesh.fsdp=-1", f"mesh.tensor={n}") for n in (2, 4, 8) if n > config.mesh.tensor]
    if config.optim.moments == "float32":
        found.append((*last, "optim.moments=bfloat16"))
    return found


def _suggest(job: Job, refused: Plan, chip: Chip) -> dict[str, Any] | None:
    """The nearest change that fits: found by arithmetic and, where there is a compiler, compiled."""
    topology, devices = refused.topology, _devices(refused.topology)
    # How far arithmetic was off for the config itself, it will be for its neighbours.
    scale = refused.bytes_per_chip["total"] / _total(job)
    sized = _sized(job.config, devices, _candidates(job.config, num_batch_shards(job.layout.mesh)))
    if isinstance(devices, int):
        for total, overrides, _ in sized:
            if total <= chip.usable_bytes:
                return {"set": list(overrides), "by": "arithmetic", "total_bytes": total}
        return _larger(job.config, topology, chip, scale)
    found = list(sized)
    likely = [item for item in found if scale * item[0] <= chip.usable_bytes]
    # Arithmetic may be wrong either way: if nothing seems to fit, the smallest is compiled all the same.
    for _, overrides, changed in likely[:MAX_TRIES] or sorted(found, key=lambda item: item[0])[:1]:
        print(f"does not fit; compiling with {' '.join(overrides)}", file=sys.stderr, flush=True)
        result = _compile(changed, topology, chip)
        if result.fits:
            return {"set": list(overrides), "by": "compiling", "total_bytes": result.bytes_per_chip["total"]}
    return _larger(job.config, topology, chip, scale)


def _sized(
    config: TrainConfig, devices: list[Any] | int, candidates: list[tuple[str, ...]]
) -> Iterator[tuple[int, tuple[str, ...], Job]]:
    """The changes that the config and the devices allow, each with its bytes by arithmetic."""
    for overrides in candidates:
        try:
            job = _job(_with(config, overrides), devices)
        except (UserError, ValueError):
            continue
        yield _total(job), overrides, job


def _larger(config: TrainConfig, topology: str, chip: Chip, scale: float) -> dict[str, Any] | None:
    """The smallest larger topology that would do, by arithmetic, as it stands or one row at a time."""
    for _ in range(6):
        kind, _, size = topology.partition(":")
        sizes = [int(n) for n in size.split("x")]
        sizes[max(i for i, n in enumerate(sizes) if n == min(sizes))] *= 2
        topology = f"{kind}:{'x'.join(map(str, sizes))}"
        try:
            devices = _devices(topology)
            rows = _num_rows(config, math.prod(sizes)) // math.prod(sizes)
        except (UserError, ValueError):
            continue
        finest = () if config.remat == "everything" else ("remat=everything",)
        finest += (f"accumulation={rows}",) if rows > config.accumulation else ()
        for total, overrides, _ in _sized(config, devices, [(), finest]):
            if scale * total <= 0.9 * chip.usable_bytes:
                return {
                    "topology": topology,
                    "set": list(overrides),
                    "by": "arithmetic",
                    "total_bytes": round(scale * total),
                }
    return None


def _total(job: Job) -> int:
    return sum(estimate(job.layout, job.batch)[0].values())


def _with(config: TrainConfig, overrides: tuple[str, ...]) -> TrainConfig:
    for override in overrides:
        config = apply_override(config, override)
    return config


def as_text(result: Plan) -> str:
    """The plan for a terminal."""
    size = {name: f"{value / GIB:.2f} GiB" for name, value in result.bytes_per_chip.items()}
    lines = [
        f"{result.topology}: {result.num_devices} devices, mesh "
        + " x ".join(f"{axis} {n}" for axis, n in result.mesh.items()),
        f"method: {result.method}",
        "batch: " + ", ".join(f"{name} {value:,}" for name, value in result.batch.items()),
        f"{'fits' if result.fits else 'DOES NOT FIT'}; per chip of {result.hbm_bytes / GIB:.2f} GiB: "
        + ", ".join(f"{name} {value}" for name, value in size.items()),
        f"flops per step: {result.flops:.4g} (model), {result.executed_flops:.4g} (with recomputation)",
    ]
    lines += [
        f"  {'/'.join(c['axes'])} {c['kind']}: {c['count']:,} times, {c['num_bytes'] / 1e9:.3f} GB"
        f" ({c['link_bytes'] / 1e9:.3f} GB into each chip)"
        for c in result.collectives
    ]
    bound = result.step_seconds_lower_bound
    lines += [
        "step time, lower bound: " + ", ".join(f"{name} {value:.4f} s" for name, value in bound.items()),
        f"MFU ceiling: {result.mfu_ceiling:.1%}",
    ]
    if result.suggestion:
        suggestion = {**result.suggestion, "total_bytes": f"{result.suggestion['total_bytes'] / GIB:.2f} GiB"}
        lines.append("nearest that fits: " + ", ".join(f"{name} {value}" for name, value in suggestion.items()))
    return "\n".join([*lines, "assumptions:", *(f"  - {text}" for text in result.assumptions)])
