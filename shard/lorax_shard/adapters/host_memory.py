"""Memory that was freed goes back to the system.

Reading an adapter makes and frees tensors of some kilobytes to megabytes, on threads of their
own. The C library keeps such memory for later, and gives each thread an arena to keep it in;
the free end of an arena is given back on no request, unless the arena is the main one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

# glibc's numbers: for the most arenas that a process may have, for how much free memory may lie
# at the end of the main one, and for the least that is mapped by itself.
_M_ARENA_MAX, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -8, -1, -3
# What a process keeps between steps; more than that is never kept in one piece.
_KEPT_BYTES, _LARGEST_KEPT = 256 << 20, 32 << 20


def use_one_arena() -> None:
    """Let all threads of this process share the main arena; to be called before they start.

    Python and the C library serve small objects without it, so few calls meet there. A user
    who sets MALLOC_ARENA_MAX knows better.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _call("mallopt", _M_ARENA_MAX, 1)


def keep_between_steps() -> None:
    """Keep what a step frees for the next one, up to 256 MB until ``give_back``.

    A step over whole texts makes and frees tensors of megabytes for each layer. Each would come from
    the system anew, page by page: a tenth of the step. A user who sets either limit knows better.
    """
    if not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        _call("mallopt", _M_MMAP_THRESHOLD, _LARGEST_KEPT)
        _call("mallopt", _M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Return freed memory to the system; takes milliseconds."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(_c_library(), name, None)
    if function is not None:  # None: another C library than glibc
        function(*arguments)


@functools.cache
def _c_library() -> Any:
    return ctypes.CDLL(None)
