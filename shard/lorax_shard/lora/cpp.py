"""The ``cpp`` backend: few rows an adapter by a kernel of our own, long spans as ``cpu`` does.

Decode rows of many adapters are thousands of tiny products; the kernel takes all slots of
a group in one call and reads each matrix once, where it lies.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lorax_shard.lora.assignment import Assignment, IdArray
from lorax_shard.lora.backend import GroupWeights, LoraBackend
from lorax_shard.lora.grouped import GroupedGroup, Loaded, add_product
from lorax_shard.lora.slot_table import SlotTable
from lorax_shard.native import load_library

_SOURCE = Path(__file__).with_name("segments.cpp")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_GROUPS = (_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT)
_SHRINK = (*_GROUPS, _POINTER, _INT, _INT, _POINTER, _INT, ctypes.c_int)
_EXPAND = (*_GROUPS, _INT, _POINTER, _INT, _POINTER, _INT, _INT, ctypes.c_int)
# A span of this many rows is long: a library product beats the kernel.
_LONG = 24


class _Layout(NamedTuple):
    """A step's rows as the kernel takes them, and the spans that it does not."""

    slots: IdArray
    starts: IdArray
    rows: IdArray
    pointers: tuple[int, int, int, int]  # of the three arrays, and the number of slots
    mask: int
    long_spans: list[tuple[int, slice]]


class _Shrunk(NamedTuple):
    short: torch.Tensor | None  # rows of the layout x R
    long: list[tuple[Loaded, slice, torch.Tensor]]


class CppGroup(GroupedGroup):
    """Keeps a table of addresses, one line a slot, that the kernel reads."""

    def __init__(self, num_members: int) -> None:
        super().__init__()
        self._table = SlotTable(num_members)
        self._address = self._table.lines.ctypes.data

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write the slot's line; the slot's views keep the matrices alive."""
        super().load(slot, weights)
        self._table.load(slot, weights)
        self._address = self._table.lines.ctypes.data

    def unload(self, slot: int) -> None:
        """Clear the slot's line."""
        super().unload(slot)
        self._table.unload(slot)

    def shrink(self, x: torch.Tensor, rows: Assignment) -> Any:
        """Compute the short groups by the kernel and each long span by one product."""
        layout = _layout(rows)
        short = None
        if layout.mask & self._table.mask:
            x = x if x.stride(1) == 1 else x.contiguous()
            short = x.new_empty(len(layout.rows), self._table.most_ranks)
            slots, starts, numbers, count = layout.pointers
            _kernels().shrink(
                self._address, self._table.line_size, slots, starts, numbers, count,
                x.data_ptr(), x.stride(0), x.shape[1],
                short.data_ptr(), self._table.most_ranks, torch.get_num_threads(),
            )  # fmt: skip
        long = [
            (loaded, span, x[span] @ loaded.a_t)
            for slot, span in layout.long_spans
            if (loaded := self._loaded.get(slot)) is not None
        ]
        return _Shrunk(short, long)

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add the short groups by the kernel and the long spans by products."""
        short, long = shrunk
        if short is not None and self._table.most_width[member]:
            assert y.stride(1) == 1, "the kernel writes contiguous columns"
            slots, starts, numbers, count = _layout(rows).pointers
            _kernels().expand(
                self._address, self._table.line_size, slots, starts, numbers, count, member,
                short.data_ptr(), self._table.most_ranks, y.data_ptr(), y.stride(0),
                self._table.most_width[member], torch.get_num_threads(),
            )  # fmt: skip
        for loaded, span, product in long:
            part = loaded.parts[member]
            if part is not None:
                columns, b = part
                add_product(y, span, product[:, columns], b)


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
            _kernels()
        except OSError as error:
            return str(error)
        return None

    def make_group(self, num_members: int) -> CppGroup:
        """Return an empty group."""
        return CppGroup(num_members)


class _Kernels(NamedTuple):
    shrink: Callable[..., None]
    expand: Callable[..., None]


@functools.cache
def _kernels() -> _Kernels:
    """Return the kernels; OSError says why there are none."""
    library, reason = load_library(_SOURCE)
    if library is None:
        raise OSError(reason)
    shrink: Any = library.lorax_lora_shrink
    expand: Any = library.lorax_lora_expand
    shrink.argtypes, shrink.restype = _SHRINK, None
    expand.argtypes, expand.restype = _EXPAND, None
    return _Kernels(shrink, expand)


def _layout(rows: Assignment) -> _Layout:
    found: _Layout | None = rows.scratch.get("cpp.layout")
    if found is None:
        found = rows.scratch["cpp.layout"] = _make_layout(rows)
    return found


def _make_layout(rows: Assignment) -> _Layout:
    long_spans = []
    numbers: dict[int, list[IdArray]] = {}
    for slot, start, stop in rows.spans:
        if stop - start >= _LONG:
            long_spans.append((slot, slice(start, stop)))
        else:
            numbers.setdefault(slot, []).append(np.arange(start, stop))
    parts = [np.concatenate(each) for each in numbers.values()]
    slots = np.array(list(numbers), dtype=np.int64)
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    short = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    pointers = (slots.ctypes.data, starts.ctypes.data, short.ctypes.data, len(slots))
    mask = sum(1 << slot for slot in numbers)
    return _Layout(slots, starts, short, pointers, mask, long_spans)
