"""Matrices of files, of which a part is read: numbers as they are, or codes packed into words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from lorax_shard.codes.tensors import CodesError, Files, shape_of

_WORD_BITS = 32


class Matrix(Protocol):
    """What is read by rows and columns."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def key(self) -> str:
        """The name of the tensor in the files."""

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return a part in float32."""


class Numbers:
    """A matrix as the file has it; a vector is one column, a single number one row of one."""

    def __init__(self, files: Files, key: str) -> None:
        stored = shape_of(files, key)
        if len(stored) > 2:
            raise CodesError(f"{key} has {len(stored)} dimensions, and no more than 2 are read")
        self.key = key
        self._file, self._dims = files[key], len(stored)
        rows, columns = (*stored, 1, 1)[:2]
        self.shape: tuple[int, int] = (rows, columns)

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return a part in float32."""
        if self._dims == 2:
            part: torch.Tensor = self._file.get_slice(self.key)[rows, columns]
            return part.float()
        whole: torch.Tensor = self._file.get_tensor(self.key)
        return whole.reshape(self.shape)[rows, columns].float()


class Words:
    """Codes of a few bits each, packed into words of 32 along a dimension, the lowest first.

    Args:
        files: the open files.
        key: the tensor of words.
        dim: the dimension along which they are packed.
        bits: of a code; they divide 32.
        order: where in a word each of its codes lies; the first lies lowest if it is not given.
        size: codes along ``dim``, where the last word is not full.
    """

    def __init__(
        self,
        files: Files,
        key: str,
        dim: int,
        bits: int,
        *,
        order: Sequence[int] | None = None,
        size: int | None = None,
    ) -> None:
        stored = shape_of(files, key)
        if len(stored) != 2 or bits not in (2, 4, 8):
            raise CodesError(
                f"{key} holds codes of {bits} bits in shape {list(stored)}, which are not read"
            )
        self.key = key
        self._file, self._dim, self._bits = files[key], dim, bits
        self._per_word = _WORD_BITS // bits
        self._order = tuple(order or range(self._per_word))
        shape = list(stored)
        shape[dim] = stored[dim] * self._per_word if size is None else size
        if -(-shape[dim] // self._per_word) != stored[dim]:
            raise CodesError(f"{key} has {stored[dim]} words for {shape[dim]} codes of {bits} bits")
        self.shape: tuple[int, int] = (shape[0], shape[1])

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return a part in float32."""
        spans = [rows, columns]
        own = spans[self._dim]
        first = own.start // self._per_word
        spans[self._dim] = slice(first, -(-own.stop // self._per_word))
        words = self._file.get_slice(self.key)[tuple(spans)].view(torch.int32)
        shifts = torch.tensor(self._order, dtype=torch.int32) * self._bits
        # The places of a word come right behind it.
        places = words.unsqueeze(self._dim + 1) >> shifts.view((-1, *(1,) * (1 - self._dim)))
        codes = (places & ((1 << self._bits) - 1)).flatten(self._dim, self._dim + 1)
        start = own.start - first * self._per_word
        part: torch.Tensor = codes.narrow(self._dim, start, own.stop - own.start)
        return part.float()
