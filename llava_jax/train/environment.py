"""What must be in the environment before JAX is imported: the compilation cache, and flags for exact GPUs."""

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

# Sums in a fixed order, and the choice of kernels kept: two starts that time kernels anew may choose differently.
GPU_FLAGS = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_per_fusion_autotune_cache_dir={workdir}/autotuned")


def prepare(workdir: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps compiled programs in the workdir, and on NVIDIA machines what exactness needs; what is set stays set."""
    if "jax" in sys.modules:
        return
    # JAX can keep compiled programs in a bucket, XLA its autotuning results only in a folder.
    root = workdir.rstrip("/") if "://" in workdir else str(Path(workdir).absolute())
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", f"{root}/compiled")
    if Path("/dev/nvidiactl").exists():
        environment["XLA_FLAGS"] = gpu_flags(environment.get("XLA_FLAGS", ""), workdir)


def gpu_flags(given: str, workdir: str) -> str:
    """The flags given, and those of ours that they do not name."""
    flags = GPU_FLAGS[:1] if "://" in workdir else GPU_FLAGS
    ours = [flag.format(workdir=Path(workdir).absolute()) for flag in flags]
    return " ".join([*given.split(), *(flag for flag in ours if flag.partition("=")[0] not in given)])
