"""What the C library keeps of memory that was freed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Takes, fills and frees eight megabytes again and again; prints how many pages that brought.
_PROGRAM = """
import ctypes, resource
from lorax_shard.adapters import host_memory

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        taken = ctypes.c_void_p(library.malloc(8 << 20))
        library.memset(taken, 1, 8 << 20)
        library.free(taken)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

host_memory.keep_between_steps()
pages()
print(pages())
"""


def pages(**variables: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        capture_output=True, text=True, check=True, timeout=60, env={**os.environ, **variables},
    )  # fmt: skip
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_kept_unless_the_user_says_otherwise() -> None:
    assert pages() < 100
    assert pages(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072") > 10_000
