"""Memory in huge pages on a CPU, where the system has them.

What is read from end to end in every step is read faster so: with small pages part of the reading
is looking pages up, and a processor foresees what it needs no further than to a page's end.

The system clears a page when it is first touched, which for a model's weights takes longer than
copying them. A start that knows what it will need asks for it ahead (``FilledAhead``), and imports
its modules meanwhile.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Linux's number for: fill these pages now.
_MADV_POPULATE_WRITE = 23
# So many bytes at a time: nothing else of the process can be mapped meanwhile.
_FILLED_AT_ONCE = 4 << 20
_HUGE_PAGE = 2 << 20
# What small pieces share.
_SHARED_BYTES = 64 << 20


class FilledAhead:
    """Memory that a thread fills with huge pages, and ``map_memory`` hands out from its start."""

    def __init__(self, num_bytes: int) -> None:
        self._size = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
        self._mapping = mmap.mmap(-1, self._size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._taken = 0
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="huge-pages", daemon=True)
        self._thread.start()

    def take(self, num_bytes: int) -> memoryview | None:
        """Return the next bytes, filled or not yet; None if there are not so many."""
        start = self._taken
        if start + num_bytes > self._size:
            return None
        self._taken += -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        return memoryview(self._mapping)[start : start + num_bytes]

    def release(self) -> None:
        """Give back what nobody took."""
        self._enough.set()
        self._thread.join()
        start = -(-self._taken // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < self._size:
            self._mapping.madvise(mmap.MADV_DONTNEED, start, self._size - start)

    def _fill(self) -> None:
        madvise: Any = ctypes.CDLL(None).madvise
        for start in range(0, self._size, _FILLED_AT_ONCE):
            size = min(_FILLED_AT_ONCE, self._size - start)
            address = ctypes.c_void_p(self._address + start)
            # What the system does not know, or has no memory for, is filled when it is touched.
            if self._enough.is_set() or madvise(
                address, ctypes.c_size_t(size), _MADV_POPULATE_WRITE
            ):
                return


_ahead: FilledAhead | None = None


def fill_ahead(num_bytes: int) -> None:
    """Begin to fill memory that ``map_memory`` will be asked for; nothing where that cannot be."""
    global _ahead
    if num_bytes > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            _ahead = FilledAhead(num_bytes)
        except (OSError, ValueError):  # too little memory, or a kernel without huge pages
            _ahead = None


def release_ahead() -> None:
    """Give back what was filled ahead and not asked for."""
    global _ahead
    ahead, _ahead = _ahead, None
    if ahead is not None:
        ahead.release()


class _Shared:
    """Mappings that small pieces of memory share, one piece behind the other.

    A piece of a few huge pages that had a mapping of its own would begin and end within such pages,
    and so lie in small ones by up to half.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        self._next = self._end = 0

    def take(self, num_bytes: int) -> Any:
        """Return fresh memory that goes back to the system when nobody has it any more."""
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            if self._mapping is None or self._next + size > self._end:
                self._mapping, self._next = _aligned(_SHARED_BYTES)
                self._end = self._next + _SHARED_BYTES
            mapping, start = self._mapping, self._next
            self._next += size
        piece = (ctypes.c_char * num_bytes).from_buffer(mapping, start)
        give_back = weakref.finalize(piece, mapping.madvise, mmap.MADV_DONTNEED, start, size)
        give_back.atexit = False
        return piece


_shared = _Shared()


def _aligned(num_bytes: int) -> tuple[mmap.mmap, int]:
    """Return a mapping and where in it so many bytes begin, with a huge page."""
    mapping = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % _HUGE_PAGE


def map_memory(num_bytes: int) -> torch.Tensor:
    """Return fresh memory as bytes; it goes back to the system when the last tensor in it does.

    What was filled ahead is handed out first.
    """
    import torch

    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    filled = None if _ahead is None else _ahead.take(num_bytes)
    if filled is not None:
        return torch.frombuffer(filled, dtype=torch.uint8)
    try:
        if num_bytes < _SHARED_BYTES // 4:
            return torch.frombuffer(_shared.take(num_bytes), dtype=torch.uint8)
        mapping, start = _aligned(num_bytes)
    except OSError:
        return torch.empty(num_bytes, dtype=torch.uint8)  # a kernel without huge pages
    # The tensor keeps the mapping alive.
    return torch.frombuffer(memoryview(mapping)[start : start + num_bytes], dtype=torch.uint8)
