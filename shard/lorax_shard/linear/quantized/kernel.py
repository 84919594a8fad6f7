"""A quantized weight as a linear computes with it on a CPU; see ``quantized.cpp``."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from lorax_shard.huge_pages import map_memory
from lorax_shard.linear.quantized import packing
from lorax_shard.linear.quantized.formats import QuantizedWeight
from lorax_shard.native import NativeFunction, load_library

_SOURCE = Path(__file__).with_name("quantized.cpp")
# The fields of QuantizedCall.
_FIELDS = struct.Struct("=12q").pack
_ALIGNMENT = 64
# Weights lie one after the other in mappings of this size: each is too small for huge pages of
# its own. What is not used of a mapping takes no memory.
_MAPPING_BYTES = 64 << 20


class QuantizedLibrary(NamedTuple):
    """The compiled kernel and its measures; ``columns`` are those of a panel."""

    linear: NativeFunction
    columns: int
    # From how many rows on a format, by its index, is computed on matrix tiles.
    tiles_from: Any


class QuantizedKernel:
    """A quantized weight in panels, which serve every row count.

    What a row gets is the same to the last bit whatever rows come beside it, on any number of
    threads; where the processor has matrix tiles so among many rows, and among few.
    """

    __slots__ = ("_bias", "_format", "_library", "_packed", "_scales", "_shape", "nbytes")

    def __init__(
        self,
        library: QuantizedLibrary,
        weight: QuantizedWeight,
        bias: torch.Tensor | None,
        memory: torch.Tensor,
    ) -> None:
        """Copy the weight into ``memory``: as many bytes as ``packed_bytes`` says."""
        self._library, self._format, self._shape = library, weight.format, weight.codes.shape
        missing = -self._shape[0] % library.columns
        self._bias = None if bias is None else _padded(bias.float(), missing)
        scales = weight.scales if weight.format.is_channelwise else None
        self._scales = None if scales is None else _padded(scales.flatten(), missing)
        self._packed = memory
        packing.pack(weight, library.columns, memory)
        self.nbytes = memory.nbytes + (0 if self._scales is None else self._scales.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute all rows in one call."""
        num_out, num_in = self._shape
        if x.dtype is not torch.float32 or not x.is_cpu:
            raise ValueError(f"the kernel computes float32 on a CPU, not {x.dtype}, {x.device}")
        if x.shape[-1] != num_in:
            raise ValueError(f"rows of {x.shape[-1]} numbers for a weight of {num_in}")
        rows = x if x.dim() == 2 else x.reshape(-1, num_in)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = rows.new_empty(rows.shape[0], num_out)
        scales, bias = self._scales, self._bias
        self._library.linear(
            _FIELDS(
                rows.data_ptr(), rows.stride(0), self._packed.data_ptr(),
                0 if scales is None else scales.data_ptr(),
                0 if bias is None else bias.data_ptr(), y.data_ptr(), num_out,
                rows.shape[0], num_in, num_out, self._format.index, torch.get_num_threads(),
            )
        )  # fmt: skip
        return y if x.dim() == 2 else y.view(*x.shape[:-1], num_out)

    def dense(self) -> torch.Tensor:
        """Return the weight in float32: exactly the numbers that take part in products."""
        weight = packing.unpack(self._format, self._shape, self._library.columns, self._packed)
        if self._scales is None:
            return weight.dense()
        scales = self._scales[: self._shape[0]].view(-1, 1)
        return QuantizedWeight(weight.format, weight.codes, scales).dense()


class QuantizedPacker:
    """Makes kernels whose weights lie close together in memory."""

    def __init__(self, library: QuantizedLibrary) -> None:
        self._library = library
        self._mapping = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def pack(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> QuantizedKernel:
        """Copy a weight into panels."""
        size = packing.packed_bytes(weight.format, weight.codes.shape, self._library.columns)
        return QuantizedKernel(self._library, weight, bias, self._take(size))

    def _take(self, num_bytes: int) -> torch.Tensor:
        if self._used + num_bytes > self._mapping.nbytes:
            self._mapping = map_memory(max(_MAPPING_BYTES, num_bytes))
            self._used = 0
        taken = self._mapping[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return taken


@functools.cache
def load_quantized(*flags: str) -> tuple[QuantizedLibrary | None, str | None]:
    """Return the kernel compiled with ``flags`` besides the usual ones, or None and the reason."""
    loaded, reason = load_library(_SOURCE, *flags)
    if loaded is None:
        return None, reason
    columns: Any = loaded.lorax_quantized_columns
    columns.argtypes, columns.restype = (), ctypes.c_int64
    tiles_from: Any = loaded.lorax_quantized_tiles_from
    tiles_from.argtypes, tiles_from.restype = (ctypes.c_int64,), ctypes.c_int64
    linear = NativeFunction(loaded, "lorax_quantized_linear", is_by_row=True)
    return QuantizedLibrary(linear, columns(), tiles_from), None


def _padded(numbers: torch.Tensor, missing: int) -> torch.Tensor:
    return functional.pad(numbers, (0, missing)).contiguous()
