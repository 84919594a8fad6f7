"""Memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return freed memory to the system where the C library keeps it for later.

    Reading an adapter makes and frees many tensors of some kilobytes, on several threads; the
    allocator would hold on to the pages of the largest one so far. Takes milliseconds: to be
    called where nobody waits.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
