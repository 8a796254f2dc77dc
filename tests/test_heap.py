"""A process that computes on a CPU starts again with the larger heap, once, and as it was called."""

import os
import subprocess
import sys

import pytest

from llava_jax.heap import HEAP

CODE = """
import os, sys
from llava_jax.heap import keep_freed_memory
print("started", flush=True)
keep_freed_memory({accelerators!r})
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
@pytest.mark.parametrize(
    ("accelerators", "given", "says"),
    [
        ((), None, f"started\nstarted\n{HEAP} ['a b', '--c']\n"),
        (("/dev/none", "/dev/nul?"), None, "started\nNone ['a b', '--c']\n"),
        ((), "glibc.malloc.arena_max=1", "started\nglibc.malloc.arena_max=1 ['a b', '--c']\n"),
    ],
    ids=["restarts", "has an accelerator", "has a value"],
)
def test_a_process_restarts_with_the_larger_heap(accelerators: tuple[str, ...], given: str | None, says: str):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", "LLAVA_JAX_HEAP")
    }
    environment |= {"GLIBC_TUNABLES": given} if given else {}
    command = [sys.executable, "-c", CODE.format(accelerators=accelerators), "a b", "--c"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == says
