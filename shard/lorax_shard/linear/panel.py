"""The ``panel`` and ``tiles`` backends: kernels of our own for a CPU; see ``panel.cpp``.

Both keep a weight in the same panels. ``panel`` gives a row the same bits whatever rows come
beside it; ``tiles`` computes many rows on matrix tiles, for a processor that has them: as exactly,
about 1.6 times as fast, and with other last bits than few rows get.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from lorax_shard.huge_pages import map_memory
from lorax_shard.native import NativeFunction, load_library

_SOURCE = Path(__file__).with_name("panel.cpp")
# The fields of PanelCall and of PackCall.
_LINEAR_FIELDS = struct.Struct("=10q").pack
_PACK_FIELDS = struct.Struct("=7q").pack
_ALIGNMENT = 64
# Weights lie one after the other in mappings of this size: each is too small for huge pages of
# its own. What is not used of a mapping takes no memory.
_MAPPING_BYTES = 64 << 20


class PanelLibrary(NamedTuple):
    """The compiled kernel and its measures."""

    linear: NativeFunction
    # The same with many rows on matrix tiles; where there are none, it is ``linear``.
    tiles: NativeFunction
    has_tiles: bool
    pack: NativeFunction
    # Columns of a panel.
    columns: int
    # The inputs of a block, for a number of inputs.
    depth: Any


class PanelKernel:
    """A weight in panels, which serve every row count.

    What a row gets is the same to the last bit whatever rows come beside it, on any number of
    threads; with ``on_tiles`` so among many rows, and among few.
    """

    __slots__ = ("__weakref__", "_bias", "_compute", "_library", "_packed", "_shape", "nbytes")

    def __init__(
        self,
        library: PanelLibrary,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        memory: torch.Tensor,
        *,
        on_tiles: bool = False,
    ) -> None:
        """Copy the weight into ``memory``: as many numbers as ``packed_size`` says."""
        num_out, num_in = weight.shape
        missing = -num_out % library.columns
        self._library, self._shape, self._packed = library, (num_out, num_in), memory
        self._compute = library.tiles if on_tiles else library.linear
        self._bias = None if bias is None else functional.pad(bias, (0, missing)).contiguous()
        self.nbytes = memory.nbytes
        weight = weight.to(torch.float32)
        library.pack(
            _PACK_FIELDS(
                weight.data_ptr(), *weight.stride(), memory.data_ptr(),
                num_in, num_out, torch.get_num_threads(),
            )
        )  # fmt: skip

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each block's first input and its part of the packed weight, as a view."""
        num_in = self._shape[1]
        width = self._packed.numel() // num_in
        depth = self._library.depth(num_in)
        for first in range(0, num_in, depth):
            size = min(depth, num_in - first)
            flat = self._packed[first * width : (first + size) * width]
            yield first, flat.view(-1, size, self._library.columns)

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
        self._compute(
            _LINEAR_FIELDS(
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
            part = block.transpose(1, 2).flatten(0, 1)[:num_out]
            weight[:, first : first + block.shape[1]] = part
        return weight


class PanelBackend:
    """Weights packed once into panels; the plain weight is not needed any more."""

    name = "panel"
    keeps_plain = False
    supersedes: tuple[str, ...] = ()
    in_programs = True
    _on_tiles = False

    def __init__(self) -> None:
        self._mapping = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        # Kernels whose weights lie in the mapping.
        self._kernels: weakref.WeakSet[PanelKernel] = weakref.WeakSet()

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs a CPU, float32 and a C++ compiler."""
        if device.type != "cpu":
            return f"it computes on the CPU, not on {device.type}"
        if dtype is not torch.float32:
            return f"it computes float32, not {str(dtype).removeprefix('torch.')}"
        return load_panels()[1]

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PanelKernel:
        """Copy the weight into panels."""
        library, reason = load_panels()
        assert library is not None, reason  # the registry makes no backend that cannot run
        memory = self._take(packed_size(library, weight)).view(torch.float32)
        kernel = PanelKernel(library, weight, bias, memory, on_tiles=self._on_tiles)
        self._kernels.add(kernel)
        return kernel

    def _take(self, numbers: int) -> torch.Tensor:
        num_bytes = 4 * numbers
        if not self._kernels:
            self._used = 0  # what was packed to be measured is gone
        if self._used + num_bytes > self._mapping.nbytes:
            self._mapping = map_memory(max(_MAPPING_BYTES, num_bytes))
            self._used = 0
            self._kernels.clear()
        taken = self._mapping[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return taken


class TileBackend(PanelBackend):
    """The same panels; many rows are computed on matrix tiles (AMX)."""

    name = "tiles"
    supersedes = ("panel",)
    _on_tiles = True

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """It needs what ``panel`` needs, and a processor with matrix tiles for bfloat16."""
        if reason := super().probe(device, dtype):
            return reason
        library, _ = load_panels()
        if library is None or not library.has_tiles:
            return "this processor has no matrix tiles (AMX), or the system does not grant them"
        return None


def packed_size(library: PanelLibrary, weight: torch.Tensor) -> int:
    """Return how many numbers a weight has in panels."""
    num_out, num_in = weight.shape
    return -(-num_out // library.columns) * library.columns * num_in


@functools.cache
def load_panels(*flags: str) -> tuple[PanelLibrary | None, str | None]:
    """Return the kernel compiled with ``flags`` besides the usual ones, or None and the reason."""
    loaded, reason = load_library(_SOURCE, *flags)
    if loaded is None:
        return None, reason
    linear = NativeFunction(loaded, "lorax_panel_linear", is_by_row=True)
    linear.joined["lorax_gated"] = NativeFunction(loaded, "lorax_panel_gated", is_by_row=True)
    tiles = NativeFunction(loaded, "lorax_tiles_linear", is_by_row=True)
    are_there: Any = loaded.lorax_tiles_are_there
    are_there.argtypes, are_there.restype = (), ctypes.c_int64
    pack = NativeFunction(loaded, "lorax_panel_pack")
    columns: Any = loaded.lorax_panel_columns
    columns.argtypes, columns.restype = (), ctypes.c_int64
    depth: Any = loaded.lorax_panel_depth
    depth.argtypes, depth.restype = (ctypes.c_int64,), ctypes.c_int64
    return PanelLibrary(linear, tiles, bool(are_there()), pack, columns(), depth), None
