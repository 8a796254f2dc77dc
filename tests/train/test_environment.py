"""What a run sets before JAX is imported: only what nobody has set."""

import subprocess
import sys
from pathlib import Path

from llava_jax.train.environment import gpu_flags
from tests.train.runs import environment


def test_gpu_flags_are_added_and_those_given_stay():
    flags = gpu_flags("--xla_gpu_deterministic_ops=false --xla_foo=1", "run").split()
    assert flags[:2] == ["--xla_gpu_deterministic_ops=false", "--xla_foo=1"]
    assert [flag.partition("=")[0] for flag in flags[2:]] == ["--xla_gpu_per_fusion_autotune_cache_dir"]


def test_this_xla_knows_the_gpu_flags(tmp_path: Path):
    """XLA ends a process that sets a flag it does not know."""
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    settings = environment(None, XLA_FLAGS=gpu_flags("", str(tmp_path)))
    result = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert result.stdout.strip() == "2", result.stderr
