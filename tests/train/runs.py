"""Real training processes for tests: started, killed, asked to stop, and what they leave behind."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from llava_jax.convert.workdir import open_workdir
from llava_jax.data.records import RecordFile, find_spans
from llava_jax.models.attention import attend_xla
from llava_jax.models.build import structure
from llava_jax.models.parameters import bind
from llava_jax.train.config import TrainConfig
from llava_jax.train.loop import data_needs
from llava_jax.train.metrics import read_metrics
from llava_jax.train.objectives import Context
from llava_jax.train.sharding import make_constrain, make_mesh

ROOT = Path(__file__).parents[2]
STEPS = 12
EVERY = "checkpoint_every=2"
# Every process that a test has started, with what it will have said: read while it runs, as a full pipe blocks its
# writer, and so its peers. tests/train/conftest.py ends the processes that a test leaves behind.
STARTED: dict[subprocess.Popen, Future[tuple[str, str]]] = {}
_READERS = ThreadPoolExecutor(32)
STAGES = {"stage1": "tests/train/stage1.py", "stage2": "configs/debug_cpu.py", "lora": "configs/debug_lora.py"}


def command(workdir: Path, *overrides: str, config: str = "configs/debug_cpu.py") -> list[str]:
    settings = [word for override in (f"data.steps={STEPS}", *overrides) for word in ("--set", override)]
    return [sys.executable, "-m", "llava_jax.cli", "train", "--config", config, "--workdir", str(workdir), *settings]


def environment(cache: Path | None, **more: str) -> dict[str, str]:
    """A compilation cache of the test's own spares every restart the same ten seconds."""
    settings = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    if cache is not None:
        settings |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | settings | more


def start(
    workdir: Path, *overrides: str, cache: Path | None = None, config: str = STAGES["stage2"], **more: str
) -> subprocess.Popen:
    """In a session of its own, so that a test can signal its whole process group."""
    process = subprocess.Popen(
        command(workdir, *overrides, config=config),
        cwd=ROOT,
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    STARTED[process] = _READERS.submit(process.communicate)
    return process


def wait(process: subprocess.Popen, timeout: float = 900) -> subprocess.CompletedProcess:
    try:
        out, err = STARTED[process].result(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def finish(workdir: Path, *overrides: str, **settings) -> subprocess.CompletedProcess:
    return wait(start(workdir, *overrides, **settings))


def start_several(
    workdir: Path, count: int, *overrides: str, cache: Path | None = None, last: tuple[str, ...] = (), **more: str
) -> list[subprocess.Popen]:
    """Processes of one run, as several hosts would start them; `last` are settings of the last one alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        start(
            workdir,
            *overrides,
            *(last if index == count - 1 else ()),
            cache=cache,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(index),
            **more,
        )
        for index in range(count)
    ]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen, timeout: float | None = None) -> None:
    """Returns when the run has recorded so many steps, has ended, or `timeout` seconds are over."""
    deadline = time.monotonic() + (timeout or 600)
    while time.monotonic() < deadline and process.poll() is None:
        metrics = workdir / "metrics.jsonl"
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= step:
            return
        time.sleep(0.005)
    assert timeout or process.poll() is not None, "the run did not reach the step"


def saved_steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def arrays(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Parameters and moments of a saved step (the newest by default) by path."""
    folder = workdir / "checkpoints" / str(saved_steps(workdir)[-1] if step is None else step)
    found = {}
    for item in ("params", "optimizer"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(folder / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def assert_same_bits(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    assert first
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert value.tobytes() == second[name].tobytes(), name


def story(workdir: Path) -> list[tuple]:
    """Loss, gradient norm and records of every step."""
    return [(line["step"], line["loss"], line["grad_norm"], line["records"]) for line in read_metrics(str(workdir))]


def hold_out(config: TrainConfig, path: Path) -> None:
    """Writes some records of a run's to be evaluated on."""
    path.write_text(json.dumps(json.loads(Path(config.data.records).read_text())[:11]))


def loss_one_by_one(workdir: Path, config: TrainConfig, path: Path) -> float:
    """The loss of a workdir's saved model on records, one row each, without padding rows or a plan."""
    needs, rows = data_needs(config), config.data.rows
    records = RecordFile(str(path), find_spans(str(path)))
    graphdef = structure(config.model)[0]
    values = {n: jnp.asarray(v.view()) for n, v in open_workdir(str(workdir))[0].items()}
    context = Context(attend=attend_xla, constrain=make_constrain(make_mesh(config.mesh)), remat=None)
    objective = jax.jit(lambda values, batch: config.objective(bind(graphdef, values), batch, context))
    total = weight = 0.0
    for i in range(len(records)):
        row = rows.assemble([rows.load(records[i], needs, np.random.default_rng(0))], needs)
        sums = objective(values, {name: jnp.asarray(value)[None] for name, value in row.items()})
        total, weight = total + float(sums.loss), weight + float(sums.weight)
    return total / weight
