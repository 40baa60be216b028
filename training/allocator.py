"""The C library's memory allocator, set for tensors on a CPU. Imports no torch."""

import os
import platform
import sys

# By default glibc returns each large tensor to the kernel and takes it anew, page by page: half of a step on a CPU. With
# these settings it keeps the memory, in huge pages.
TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592"
    ":glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1"
)
LONG_COMMANDS = ("train", "evaluate", "align", "benchmark")


def keep_memory(command: str) -> None:
    """Restarts this program with these settings, which glibc reads at the start, if `command` is a long one."""
    if command not in LONG_COMMANDS or "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    environment = os.environ | {"GLIBC_TUNABLES": TUNABLES}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
