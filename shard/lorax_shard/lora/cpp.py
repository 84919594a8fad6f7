"""The ``cpp`` backend: few rows an adapter by a kernel of our own, long segments as ``cpu`` does.

Decode rows of many adapters are thousands of tiny products; the kernel takes all slots of
a group in one call and reads each matrix once, where it lies.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorax_shard.lora.assignment import Assignment, IdArray
from lorax_shard.lora.backend import GroupWeights, LoraBackend
from lorax_shard.lora.grouped import GroupedGroup, Loaded, add_product
from lorax_shard.lora.slot_table import SlotTable
from lorax_shard.native import load_library

_SOURCE = Path(__file__).with_name("segments.cpp")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (
    _POINTER, _POINTER, _POINTER, _INT,  # group, layout, x and its stride
    _POINTER, _POINTER, _INT, _INT, ctypes.c_int,  # h, y and its stride, member, threads
)  # fmt: skip
# A segment of this many rows is long: a library product beats the kernel.
_LONG = 32


class _Layout:
    """A step's rows as the kernel takes them, and the segments that it does not."""

    __slots__ = ("_arrays", "_h", "address", "long_segments", "mask", "num_rows")

    def __init__(self, rows: Assignment) -> None:
        numbers: dict[int, list[IdArray]] = {}
        self.long_segments: list[tuple[int, slice]] = []
        for slot, start, stop in rows.segments:
            if stop - start >= _LONG:
                self.long_segments.append((slot, slice(start, stop)))
            else:
                numbers.setdefault(slot, []).append(np.arange(start, stop))
        parts = [np.concatenate(each) for each in numbers.values()]
        slots = np.array(list(numbers), dtype=np.int64)
        starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        short = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        addresses = [each.ctypes.data for each in (slots, starts, short)]
        header = np.array([*addresses, len(slots)], dtype=np.int64)
        self._arrays = (slots, starts, short, header)
        self.address = header.ctypes.data
        self.mask = sum(1 << slot for slot in numbers)
        self.num_rows = len(short)
        self._h = torch.empty(0)

    def h(self, ranks: int) -> int:
        """Return the address of a buffer for the shrunk rows; one group uses it at a time."""
        if self._h.numel() < self.num_rows * ranks:
            self._h = torch.empty(self.num_rows * ranks)
        return self._h.data_ptr()


class _DeferredShrink:
    """An input that the kernel shrinks when the first member expands it."""

    __slots__ = ("layout", "long", "x")

    def __init__(
        self,
        x: torch.Tensor | None,
        layout: _Layout,
        long: list[tuple[Loaded, slice, torch.Tensor]],
    ) -> None:
        self.x, self.layout, self.long = x, layout, long


class CppGroup(GroupedGroup):
    """Keeps a table of addresses, one line a slot, that the kernel reads."""

    def __init__(self, num_members: int) -> None:
        super().__init__()
        # Its own: a line is read by one call for one group.
        self._lines = SlotTable().join(num_members)
        self._header: IdArray = np.zeros(0, dtype=np.int64)
        self._address = 0

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write the slot's line; the slot's views keep the matrices alive."""
        super().load(slot, weights)
        self._lines.load(slot, weights)
        self._write_header(weights.a.shape[1])

    def unload(self, slot: int) -> None:
        """Clear the slot's line."""
        super().unload(slot)
        self._lines.unload(slot)
        self._write_header(int(self._header[3]))

    def _write_header(self, width_in: int) -> None:
        table, own = self._lines.table, self._lines
        fields = [table.lines.ctypes.data, table.line_size, own.most_ranks, width_in]
        fields.append(table.num_lines)
        self._header = np.array(fields + own.most_width, dtype=np.int64)
        self._address = self._header.ctypes.data

    def shrink(self, x: torch.Tensor, rows: Assignment) -> _DeferredShrink | None:
        """Compute each long segment by one product; the kernel takes the rest while it expands."""
        if not rows.mask & self._lines.mask:
            return None
        layout = rows.scratch.get("cpp.layout")
        if layout is None:
            layout = rows.scratch["cpp.layout"] = _Layout(rows)
        long = [
            (loaded, segment, x[segment] @ loaded.a_t)
            for slot, segment in layout.long_segments
            if (loaded := self._loaded.get(slot)) is not None
        ]
        if x.stride(1) != 1:
            x = x.contiguous()
        return _DeferredShrink(x, layout, long)

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add the short groups by the kernel and the long segments by products."""
        if shrunk is None:
            return
        layout: _Layout = shrunk.layout
        if layout.mask & self._lines.mask and self._lines.most_width[member]:
            assert y.stride(1) == 1, "the kernel writes contiguous columns"
            x: torch.Tensor | None = shrunk.x
            shrunk.x = None
            _kernel()(
                self._address, layout.address,
                None if x is None else x.data_ptr(), 0 if x is None else x.stride(0),
                layout.h(self._lines.most_ranks), y.data_ptr(), y.stride(0), member,
                torch.get_num_threads(),
            )  # fmt: skip
        for loaded, segment, product in shrunk.long:
            part = loaded.parts[member]
            if part is not None:
                columns, b = part
                add_product(y, segment, product[:, columns], b)


class CppLora(LoraBackend):
    """Needs a CPU, float32 and a C++ compiler."""

    name = "cpp"

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the kernel cannot be built or loaded here, or None."""
        if device.type != "cpu":
            return f"it computes on a CPU, not on {device.type}"
        if dtype is not torch.float32:
            return f"it computes float32, not {str(dtype).removeprefix('torch.')}"
        try:
            _kernel()
        except OSError as error:
            return str(error)
        return None

    def make_group(self, num_members: int) -> CppGroup:
        """Return an empty group."""
        return CppGroup(num_members)


@functools.cache
def _kernel() -> Callable[..., None]:
    """Return the kernel; OSError says why there is none."""
    library, reason = load_library(_SOURCE)
    if library is None:
        raise OSError(reason)
    function: Any = library.lorax_lora_apply
    function.argtypes, function.restype = _ARGUMENTS, None
    loaded: Callable[..., None] = function
    return loaded
