"""Real training processes for tests: started, killed, asked to stop, and what they leave behind."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from llava_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 12


def command(workdir: Path, *overrides: str, config: str = "configs/debug_cpu.py") -> list[str]:
    settings = [word for override in (f"data.steps={STEPS}", *overrides) for word in ("--set", override)]
    return [sys.executable, "-m", "llava_jax.cli", "train", "--config", config, "--workdir", str(workdir), *settings]


def environment(cache: Path | None, **more: str) -> dict[str, str]:
    """A compilation cache of the test's own spares every restart the same ten seconds."""
    settings = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    if cache is not None:
        settings |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | settings | more


def start(workdir: Path, *overrides: str, cache: Path | None = None, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(workdir, *overrides),
        cwd=ROOT,
        env=environment(cache, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(workdir: Path, *overrides: str, cache: Path | None = None, **more: str) -> subprocess.CompletedProcess:
    process = start(workdir, *overrides, cache=cache, **more)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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
