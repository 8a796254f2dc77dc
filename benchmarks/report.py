"""What every benchmark shares: repetitions in pairs, the machine, one table, JSON beside it."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "torch", "transformers", "pillow", "numpy")
Run = Callable[[], Any]


def arguments(
    description: str, *, sizes: Sequence[str], stages: Sequence[str] = (), flags: Mapping[str, str] = {}, **more: str
) -> argparse.Namespace:
    """The options that all benchmarks have, `--stage` where there are several, `flags` and `more`: names and help."""
    parser = argparse.ArgumentParser(description=description)
    if stages:
        parser.add_argument("--stage", choices=stages, default=stages[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--size", choices=sizes, default=sizes[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table and its JSON")
    parser.add_argument("--only-ours", action="store_true", help="leave the peer out")
    for name, purpose in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=purpose)
    for name, purpose in more.items():
        parser.add_argument(f"--{name}", help=purpose)
    chosen = parser.parse_args()
    if chosen.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    return chosen


def in_turns(runs: Mapping[Any, Run], *, repeats: int, warmups: int = 1) -> dict[Any, list[float]]:
    """Seconds of every run, taken in turns so that what else the machine does hits all alike; order alternates.

    A run returns nothing, or its own seconds where only a part of it is timed.
    """
    for _ in range(warmups):
        for run in runs.values():
            run()
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        names = list(runs) if repeat % 2 == 0 else list(runs)[::-1]
        for name in names:
            begin = time.perf_counter()
            own = runs[name]()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - begin)
    return seconds


def quartiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The median and the two quartiles around it."""
    low, median, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high}


def rate(amount: float, seconds: Sequence[float]) -> dict[str, float]:
    """Amount per second."""
    return quartiles(amount / np.asarray(seconds))


def ratio(peer: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """The peer's time over ours, pair by pair: above 1, ours is faster."""
    return quartiles(np.asarray(peer) / np.asarray(ours))


def publish(name: str, chosen: argparse.Namespace, rows: Sequence[Mapping[str, Any]], notes: Mapping[str, Any]) -> None:
    """Prints one table and writes it, and the JSON with everything, to the results folder."""
    table = as_table(rows)
    facts = machine(chosen.device)
    lines = [
        f"{name}, {facts['command']}",
        f"{facts['machine']}; {facts['date']}; load {facts['load_average']} at the end",
        ", ".join(f"{package} {version}" for package, version in facts["versions"].items()),
    ]
    text = "\n\n".join([*lines, table, *(f"{key}: {value}" for key, value in notes.items())]) + "\n"
    print(text)
    chosen.results.mkdir(parents=True, exist_ok=True)
    path = chosen.results / f"{name}_{chosen.device}_{chosen.size}"
    path.with_suffix(".md").write_text(text)
    content = {"benchmark": name, **facts, "rows": list(rows), "notes": dict(notes)}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; a measured figure is its median and, in brackets, its quartiles."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['median']:.4g} ({value['low']:.4g}..{value['high']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: str) -> dict[str, Any]:
    """Class of machine, versions, date and command: what a figure is worth nothing without."""
    import jax

    return {
        "machine": f"{processor()}, {os.cpu_count()} cores" if device == "cpu" else jax.devices()[0].device_kind,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if _is_installed(name)},
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "load_average": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
