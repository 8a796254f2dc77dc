"""A process that computes on a CPU starts again with the larger heap, once, and as it was called."""

import os
import platform
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


FREED = """
import ctypes, resource, threading
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, faults = 2**28, []
def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
for _ in range(3):
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
print(faults[-1])
"""


NAME, VERSION = platform.libc_ver()


@pytest.mark.skipif(
    NAME != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="glibc has huge pages since 2.35"
)
def test_what_any_thread_frees_is_kept_for_the_next():
    """XLA's threads allocate 256 MB, as a step does: the pages are there the third time."""

    def faults(environment: dict[str, str]) -> int:
        plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        command = [sys.executable, "-c", FREED]
        return int(subprocess.run(command, env=plain | environment, capture_output=True, check=True).stdout)

    assert faults({"GLIBC_TUNABLES": HEAP}) < 20 < faults({})
