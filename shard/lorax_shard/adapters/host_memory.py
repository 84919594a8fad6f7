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

# glibc's number for the most arenas that a process may have.
_M_ARENA_MAX = -8


def use_one_arena() -> None:
    """Let all threads of this process share the main arena; to be called before they start.

    Python and the C library serve small objects without it, so few calls meet there. A user
    who sets MALLOC_ARENA_MAX knows better.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _call("mallopt", _M_ARENA_MAX, 1)


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
