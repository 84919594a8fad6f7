"""The ``cpp`` backend: one call of a kernel of our own for all adapters and all siblings.

Decode rows of many adapters are thousands of tiny products, prompts are blocks of rows: the
kernel takes all slots of a group in one call and reads each matrix where it lies, in the type
in which it was stored; it widens numbers in registers and sums in float32.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorax_shard.lora.assignment import Assignment, FixedAssignment, IdArray
from lorax_shard.lora.backend import ExpertsWeights, GroupWeights, LoraBackend, LoraGroup
from lorax_shard.lora.host_rows import Extent, HostLines, HostRows, HostTable
from lorax_shard.mixture.pairs import Pairs, ToldFunction
from lorax_shard.native import NativeFunction, load_library
from lorax_shard.numbers import TYPES

_SOURCE = Path(__file__).with_name("segments.cpp")
# The fields of LoraCall and of PackCall.
_FIELDS = struct.Struct("=11q").pack
_PACK_FIELDS = struct.Struct("=7q").pack
_LAYOUT = "cpp.layout"
_KERNEL = "lorax_lora_apply"


class _Input:
    """An input that the kernel shrinks when the first members are expanded."""

    __slots__ = ("layout", "x")

    def __init__(self, x: torch.Tensor, layout: HostRows) -> None:
        self.x: torch.Tensor | None = x
        self.layout = layout


class CppGroup(LoraGroup):
    """Keeps its part of a table of addresses, one line a slot, that the kernel reads."""

    is_fused = True

    def __init__(self, lines: HostLines, extent: Extent, pairs: HostRows) -> None:
        self._lines, self._extent = lines, extent
        # Keeps alive what the table has addresses of.
        self._weights: dict[int, GroupWeights | ExpertsWeights] = {}
        # Where members begin, by the columns asked for.
        self._columns: dict[tuple[int, ...], torch.Tensor] = {}
        # All that the kernel needs to find the rows of pairs in this group.
        self._own = torch.tensor([lines.address, pairs.address, self._starts((0,))])
        self._told = ToldFunction(_library().add_team, self._own.data_ptr())

    def load(self, slot: int, weights: GroupWeights) -> None:
        """Write the slot's line."""
        self._lines.load(slot, weights)
        self._weights[slot] = weights

    def unload(self, slot: int) -> None:
        """Clear the slot's line."""
        self._lines.unload(slot)
        del self._weights[slot]

    def load_experts(self, first: int, weights: ExpertsWeights) -> None:
        """Write the lines of all experts at once."""
        self._lines.load_experts(first, weights)
        self._weights[first] = weights

    def unload_experts(self, first: int, count: int) -> None:
        """Clear the lines of all experts at once."""
        self._lines.unload(first, count)
        del self._weights[first]

    def reserve(self, *, ranks: int, widths: list[int]) -> None:
        """Have room for slots of so many ranks; all else is read from the table at each call."""
        self._extent.add(0, ranks)

    def shrink(self, x: torch.Tensor, rows: Assignment) -> _Input | None:
        """Keep the input: the kernel shrinks it while it expands."""
        if not (rows.is_fixed or rows.mask & self._lines.mask):
            return None
        return _Input(x if x.stride(1) == 1 else x.contiguous(), self._layout(rows))

    def _layout(self, rows: Assignment) -> HostRows:
        layout: HostRows | None = rows.scratch.get(_LAYOUT)
        if layout is None:
            layout = rows.scratch[_LAYOUT] = HostRows(self._extent, _library().lay_out)
            layout.write(rows.slot_of_row)
        return layout

    @property
    def told(self) -> ToldFunction:
        """Return the kernel, and where it looks slots and rows up."""
        return self._told

    def expand(self, shrunk: Any, member: int, y: torch.Tensor, rows: Assignment) -> None:
        """Add one member's outputs."""
        self._apply(shrunk, member, (0,), y)

    def expand_all(
        self, shrunk: Any, columns: tuple[int, ...], y: torch.Tensor, rows: Assignment
    ) -> None:
        """Add the outputs of all members in one call."""
        self._apply(shrunk, 0, columns, y)

    def _apply(
        self, shrunk: _Input | None, member: int, columns: tuple[int, ...], y: torch.Tensor
    ) -> None:
        if shrunk is not None:
            x, shrunk.x = shrunk.x, None
            _library().apply(self._fields(shrunk.layout, x, y, member, columns))

    def _fields(
        self,
        layout: HostRows,
        x: torch.Tensor | None,
        y: torch.Tensor,
        member: int,
        columns: tuple[int, ...],
    ) -> bytes:
        """Return what has ``x`` shrunk, unless there is none, and some members expanded."""
        assert y.stride(1) == 1, "the kernel writes contiguous columns"
        return _FIELDS(
            self._lines.address, layout.address,
            0 if x is None else x.data_ptr(), 0 if x is None else x.stride(0),
            y.data_ptr(), y.stride(0), self._starts(columns), member, len(columns),
            torch.get_num_threads(), 0,
        )  # fmt: skip

    def _starts(self, columns: tuple[int, ...]) -> int:
        found = self._columns.get(columns)
        if found is None:
            found = self._columns[columns] = torch.tensor(columns, dtype=torch.int64)
        return found.data_ptr()


def pack(matrix: torch.Tensor, panels: torch.Tensor) -> None:
    """Write a matrix (r x n, any strides) in panels into a contiguous one of its shape and type."""
    _library().pack(
        _PACK_FIELDS(
            matrix.data_ptr(), panels.data_ptr(), TYPES[matrix.dtype], *matrix.shape, *matrix.stride()
        )
    )  # fmt: skip


class CppLora(LoraBackend):
    """Needs a CPU, float32 and a C++ compiler."""

    name = "cpp"
    kernels = frozenset({_KERNEL})
    keeps_stored = True

    def __init__(self) -> None:
        self._extent = Extent()
        self._table = HostTable(self._extent)
        self._fixed = HostRows(self._extent, _library().lay_out)
        self._pairs = HostRows(self._extent, _library().lay_out)
        # Read through the layout alone, however many pairs a step has.
        self._of_pairs = FixedAssignment(torch.empty(0, dtype=torch.int64))
        self._of_pairs.scratch[_LAYOUT] = self._pairs

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the kernel cannot be built or loaded here, or None."""
        if device.type != "cpu":
            return f"it computes on a CPU, not on {device.type}"
        if dtype is not torch.float32:
            return f"it computes float32, not {str(dtype).removeprefix('torch.')}"
        try:
            _library()
        except OSError as error:
            return str(error)
        return None

    @property
    def pack(self) -> Callable[[torch.Tensor, torch.Tensor], None]:
        """Return what writes matrices in panels."""
        return pack

    def reserve(self, num_slots: int, device: torch.device) -> None:
        """Nothing to do: lines are found through an address that stays."""

    def read_slots(self, rows: Assignment, slots: torch.Tensor) -> None:
        """Let ``rows`` have the slots that stand in a tensor, until others are written."""
        self.write_slots(slots.numpy())
        rows.scratch[_LAYOUT] = self._fixed

    def write_slots(self, slot_of_row: IdArray) -> None:
        """Let calls that were made of fixed rows have others, and as many as there are now."""
        self._fixed.write(slot_of_row)

    def assign_pairs(self, pairs: Pairs, slots: torch.Tensor, per_slot: int) -> Assignment:
        """Return rows that lie where the last ones lay."""
        self._pairs.write_pairs(slots, pairs.tokens, pairs.experts, per_slot)
        return self._of_pairs

    def told_of_pairs(self, num_pairs: int, per_slot: int) -> ToldFunction:
        """Return what lays out pairs where the last ones lay."""
        return ToldFunction(_library().lay_out_pairs, self._pairs.expect_pairs(num_pairs, per_slot))

    @property
    def told_pairs(self) -> Assignment:
        """The same as ``assign_pairs`` returns."""
        return self._of_pairs

    def make_group(self, num_members: int) -> CppGroup:
        """Return an empty group."""
        return CppGroup(self._table.join(num_members), self._extent, self._pairs)


class _Library(NamedTuple):
    """The compiled kernel."""

    apply: NativeFunction
    # Writes the rows of a step, in this thread.
    lay_out: Callable[[bytes], None]
    # Writes a matrix in panels, in this thread.
    pack: Callable[[bytes], None]
    # Addresses of what is told of pairs when they are made, and of their products.
    lay_out_pairs: int
    add_team: int


@functools.cache
def _library() -> _Library:
    """Return the kernel; OSError says why there is none."""
    library, reason = load_library(_SOURCE)
    if library is None:
        raise OSError(reason)
    others: list[Any] = [library.lorax_lora_lay_out, library.lorax_lora_pack]
    for function in others:
        function.argtypes, function.restype = (ctypes.c_char_p,), None
    told = (library.lorax_lora_lay_out_pairs, library.lorax_lora_add_team)
    addresses = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in told)
    return _Library(NativeFunction(library, _KERNEL, is_by_row=True), *others, *addresses)
