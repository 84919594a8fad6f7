"""Floats of four bits, two in a byte, whose groups share a scale: NVFP4, and MXFP4 of linears."""

from __future__ import annotations

import torch

from lorax_shard.codes.grid import GridWeight, Groups, groups_of
from lorax_shard.codes.matrices import Matrix, Numbers
from lorax_shard.codes.tensors import CodesError, Files, dtype_of, shape_of

# One bit for the sign, two for the exponent, one for the fraction.
_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor((*_HALF, *(-each for each in _HALF)))
# What is taken off a power of two that is stored as a byte.
BIAS = 127


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Return the numbers of bytes (... x bytes); the lower half of a byte comes first."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return VALUES[codes.long()]


def four_bits(files: Files, key: str) -> GridWeight:
    """Return a weight (out x in) of bytes at ``key``, with scales for groups of inputs.

    Scales are powers of two, or E4M3 numbers of which all share one more: compressed-tensors
    divides by it (``weight_global_scale``), ModelOpt multiplies (``weight_scale_2``).
    """
    stem = key.removesuffix("_packed")
    codes, name = _Pairs(files, key), f"{stem}_scale"
    beside = [each for each in (f"{stem}_global_scale", f"{stem}_scale_2") if each in files]
    if not beside and (name not in files or dtype_of(files, name) != "U8"):
        raise CodesError(f"{key} has no {stem}_global_scale or {stem}_scale_2 beside its scales")
    scales: Matrix = _Products(files, name, beside[0]) if beside else _Powers(files, name)
    columns = groups_of(name, codes.shape[1], scales.shape[1], None)
    return GridWeight(codes, scales, (Groups(1), columns), beside=beside)


class _Pairs:
    """Implements Matrix: numbers of four bits (rows x twice as many as bytes)."""

    def __init__(self, files: Files, key: str) -> None:
        rows, num_bytes = shape_of(files, key)
        self.key, self._file = key, files[key]
        self.shape = (rows, 2 * num_bytes)

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        first = columns.start // 2
        packed: torch.Tensor = self._file.get_slice(self.key)[rows, first : -(-columns.stop // 2)]
        start = columns.start - 2 * first
        part: torch.Tensor = unpacked(packed)[:, start : start + columns.stop - columns.start]
        return part


class _Products(Numbers):
    """Scales times, or divided by, a number that all of them share."""

    def __init__(self, files: Files, key: str, shared: str) -> None:
        super().__init__(files, key)
        self._shared: torch.Tensor = files[shared].get_tensor(shared).float().flatten()[0]
        self._divides = shared.endswith("_global_scale")

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        scales = super().read(rows, columns)
        return scales / self._shared if self._divides else scales * self._shared


class _Powers(Numbers):
    """Powers of two, stored as bytes."""

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        return torch.exp2(super().read(rows, columns) - BIAS)
