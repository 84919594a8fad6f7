"""Walks over the head of a GGUF file before a library reads it.

The library believes what lengths say: a list of 2^60 numbers in a file that ends is read number by
number, for ever. Here each length has to lie within the file.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Bytes of a value by its type, in the numbers of the format.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9
_MAX_DIMENSIONS, _MAX_DEPTH = 8, 2


def check_head(path: Path) -> None:
    """Raise ValueError for a file whose head is none, or names more than the file has."""
    with path.open("rb") as file:
        if path.stat().st_size < len(_MAGIC):
            raise ValueError("it is cut off")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Head(content).walk()


class _Head:
    """A place in the head, which only goes on."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._place = 0
        self._order = "<"

    def walk(self) -> None:
        """Go over all of it."""
        if self._content[: len(_MAGIC)] != _MAGIC:
            raise ValueError("it does not begin as one")
        self._skip(len(_MAGIC))
        version = self._number(4)
        if not version & 0xFFFF:
            # Written by a machine that has its bytes in the other order.
            self._order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}; 2 and 3 are read")
        num_tensors, num_values = self._number(8), self._number(8)
        for _ in range(num_values):
            self._skip(self._number(8))
            self._value(self._number(4))
        for _ in range(num_tensors):
            self._tensor()

    def _tensor(self) -> None:
        self._skip(self._number(8))
        num_dimensions = self._number(4)
        if num_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {num_dimensions} dimensions")
        self._skip(8 * num_dimensions + 4 + 8)

    def _value(self, kind: int, depth: int = 0) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind])
        elif kind == _TEXT:
            self._skip(self._number(8))
        elif kind == _LIST and depth < _MAX_DEPTH:
            inner, length = self._number(4), self._number(8)
            if inner in _SCALARS:
                self._skip(length * _SCALARS[inner])
                return
            for _ in range(length):
                self._value(inner, depth + 1)
        else:
            raise ValueError(f"a value is of the type {kind}, which is not known")

    def _number(self, size: int) -> int:
        place = self._place
        self._skip(size)
        found: int = struct.unpack_from(
            f"{self._order}{'I' if size == 4 else 'Q'}", self._content, place
        )[0]
        return found

    def _skip(self, size: int) -> None:
        self._place += size
        if self._place > len(self._content):
            raise ValueError("it is cut off, or a length in it is wrong")
