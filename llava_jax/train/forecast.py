"""How long a save will take, told at the start: a machine that is taken away grants only so much grace."""

import os
import tempfile
import time
from typing import Any

import jax
from etils import epath

from llava_jax.train import processes
from llava_jax.train.mirror import is_remote

PROBE_BYTES = 64 << 20
# What spot machines grant at least: 15 seconds on GKE, 30 on Compute Engine.
GRACE_SECONDS = 15.0
# Bytes a second of the slowest disk that a run is patient with.
SLOWEST_DISK = 5e6


def save_forecast(workdir: str, trees: Any) -> str:
    """One sentence on the bytes of a checkpoint, the speed that a probe wrote with, and the grace it needs."""
    num_bytes = _bytes_per_process(trees)
    probe = bytes(min(num_bytes, PROBE_BYTES))
    start = time.perf_counter()
    if is_remote(workdir):
        path = epath.Path(workdir) / f"probe-{processes.index()}"
        path.write_bytes(probe)
        path.unlink()
    else:
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(probe)
            file.flush()
            os.fsync(file.fileno())
    speed = max(len(probe), 1) / (time.perf_counter() - start)
    seconds = num_bytes / speed
    warning = (
        "" if seconds < GRACE_SECONDS else "; SHORTER THAN THAT, a preempted run loses the steps since its last save"
    )
    return (
        f"a save writes {num_bytes / 1e6:,.1f} MB a process, {seconds:.1f} s at the {speed / 1e6:,.0f} MB/s measured; "
        f"the grace period after SIGTERM must be longer (spot machines: {GRACE_SECONDS:.0f} to 30 s){warning}"
    )


def longest_save(trees: Any) -> float:
    """Seconds after which a save will not end any more."""
    return _bytes_per_process(trees) / SLOWEST_DISK


def _bytes_per_process(trees: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees)) // processes.count()
