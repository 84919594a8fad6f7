"""The ``panel`` backend: a kernel of our own for a CPU; see ``panel.cpp`` and ``native``."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from lorax_shard.native import load_library

_SOURCE = Path(__file__).with_name("panel.cpp")
# The fields of PanelCall.
_PACK_CALL = struct.Struct("=10q").pack


class _Library(NamedTuple):
    linear: Any
    # Columns of a panel.
    columns: int
    # The inputs of a block, for a number of inputs.
    depth: Any


class PanelKernel:
    """A weight in panels, which serve every row count.

    What a row gets is the same to the last bit whatever rows come beside it, on any number of
    threads.
    """

    __slots__ = ("_bias", "_library", "_packed", "_shape", "nbytes")

    def __init__(self, library: _Library, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        num_out, num_in = weight.shape
        missing = -num_out % library.columns
        self._library, self._shape = library, (num_out, num_in)
        self._bias = None if bias is None else functional.pad(bias, (0, missing)).contiguous()
        self._packed = torch.empty((num_out + missing) * num_in)
        self.nbytes = self._packed.nbytes
        for first, block in self._blocks():
            block.flatten(0, 1)
            part = functional.pad(weight[:, first : first + block.shape[1]], (0, 0, 0, missing))
            block.copy_(part.view(-1, library.columns, block.shape[1]).transpose(1, 2))

    def _blocks(self) -> list[tuple[int, torch.Tensor]]:
        """Return each block's first input and its part of the packed weight, as a view."""
        num_out, num_in = self._shape
        columns, depth = self._library.columns, self._library.depth(num_in)
        num_panels = -(-num_out // columns)
        blocks = []
        for first in range(0, num_in, max(depth, 1)):
            size = min(depth, num_in - first)
            start = first * num_panels * columns
            flat = self._packed[start : start + size * num_panels * columns]
            blocks.append((first, flat.view(num_panels, size, columns)))
        return blocks

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
        bias = self._bias
        self._library.linear(
            _PACK_CALL(
                rows.data_ptr(), rows.stride(0), self._packed.data_ptr(),
                0 if bias is None else bias.data_ptr(), y.data_ptr(), num_out,
                rows.shape[0], num_in, num_out, torch.get_num_threads(),
            )
        )  # fmt: skip
        return y if x.dim() == 2 else y.view(*x.shape[:-1], num_out)

    def dense(self) -> torch.Tensor:
        """Return the weight unpacked: exactly the numbers that were packed."""
        num_out, num_in = self._shape
        weight = torch.empty(num_out, num_in)
        for first, block in self._blocks():
            size = block.shape[1]
            weight[:, first : first + size] = block.transpose(1, 2).flatten(0, 1)[:num_out]
        return weight


class PanelBackend:
    """Weights packed once into panels; the plain weight is not needed any more."""

    name = "panel"
    keeps_plain = False

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs a CPU, float32 and a C++ compiler."""
        if device.type != "cpu":
            return f"it computes on the CPU, not on {device.type}"
        if dtype is not torch.float32:
            return f"it computes float32, not {str(dtype).removeprefix('torch.')}"
        _, reason = _library()
        return reason

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PanelKernel:
        """Copy the weight into panels."""
        library, reason = _library()
        assert library is not None, reason  # the registry makes no backend that cannot run
        return PanelKernel(library, weight, bias)


@functools.cache
def _library() -> tuple[_Library | None, str | None]:
    """Return the kernel and its measures, or None and the reason in words."""
    loaded, reason = load_library(_SOURCE)
    if loaded is None:
        return None, reason
    linear: Any = loaded.lorax_panel_linear
    linear.argtypes, linear.restype = (ctypes.c_char_p,), None
    columns: Any = loaded.lorax_panel_columns
    columns.argtypes, columns.restype = (), ctypes.c_int64
    depth: Any = loaded.lorax_panel_depth
    depth.argtypes, depth.restype = (ctypes.c_int64,), ctypes.c_int64
    return _Library(linear, columns(), depth), None
