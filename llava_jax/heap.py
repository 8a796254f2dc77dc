"""The heap of a process on a machine without accelerators."""

import os
import sys
from collections.abc import Iterable
from glob import glob

# Huge pages; large blocks from the heap, which is never trimmed; one heap for all threads, since that of one of them
# has no room for blocks of more than 64 MB, which would go back to the kernel after all.
HEAP = ":".join(
    f"glibc.malloc.{name}"
    for name in (
        "hugetlb=1",
        "mmap_threshold=4294967296",
        "trim_threshold=4294967296",
        "top_pad=67108864",
        "arena_max=1",
    )
)
# Where Linux shows NVIDIA's and AMD's GPUs, and TPUs.
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def keep_freed_memory(accelerators: Iterable[str] = ACCELERATORS) -> None:
    """Starts this process again with a heap that keeps what XLA frees, unless the machine has accelerators.

    On a CPU every step allocates its temporaries anew, and the kernel clears each page of them again; see
    docs/performance.md. Only a variable that is there when the process starts can change that; processes that it
    starts inherit it.
    """
    # A second mark, of our own: a program that is started without variables like this would start for ever.
    is_set = "GLIBC_TUNABLES" in os.environ or "LLAVA_JAX_HEAP" in os.environ
    if sys.platform == "linux" and not is_set and not any(map(glob, accelerators)):
        os.environ |= {"GLIBC_TUNABLES": HEAP, "LLAVA_JAX_HEAP": "kept"}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
