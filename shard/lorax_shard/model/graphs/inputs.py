"""What graphs of decode steps read: tensors that stay where they are, filled by one transfer a step.

::

    input_ids | positions | kv_slots | lora_slots | context_lens | unread | splits ... | tables
    `------------------------- N places each --------------------------------------´   R x width

The tables come last and as wide as a step's longest row; from there they are copied to where
kernels look for them, N x the widest.

Legend: N most rows, R rows of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lorax_shard.attention.backend import FixedDecodes
from lorax_shard.lora.assignment import BASE
from lorax_shard.model.interface import PassNumbers, UnreadIds
from lorax_shard.transfer import torch_dtype

_ALIGNMENT = 16
# A place for each row.
_WIDE = ("input_ids", "positions", "kv_slots", "lora_slots", "unread_at", "unread_of")
# Of padding rows: they write nothing, see nothing, and have no adapter.
_NOWHERE = -1


class _Field(NamedTuple):
    """Where numbers of one kind stand in the transfer."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> slice:
        """Its bytes."""
        return slice(self.start, self.start + math.prod(self.shape) * self.dtype.itemsize)


class GraphInputs:
    """Owns the tensors; ``numbers`` are views of them by name, ``tables`` the tables of blocks."""

    def __init__(
        self, decodes: FixedDecodes, max_rows: int, max_blocks: int, device: torch.device
    ) -> None:
        self.max_rows, self.max_blocks = max_rows, max_blocks
        self._decodes, self._device = decodes, device
        of_rows = dict.fromkeys(_WIDE, (np.dtype(np.int64), (max_rows,)))
        narrow = {"context_lens": (max_rows,), **decodes.shapes}
        self._fields, self._first_table = _side_by_side(
            {**of_rows, **{name: (np.dtype(np.int32), shape) for name, shape in narrow.items()}}
        )
        size = self._first_table + max_rows * max_blocks * 4
        self._buffer = torch.zeros(size, dtype=torch.uint8, device=device)
        self.numbers = {
            name: self._buffer[field.bytes].view(torch_dtype(field.dtype)).view(field.shape)
            for name, field in self._fields.items()
        }
        self.tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)

    def fill(self, numbers: PassNumbers, lora_slots: list[int], num_rows: int) -> None:
        """Have the tensors hold a step of decode rows, padded to ``num_rows``; waits for nothing."""
        count, width = numbers.tables.shape
        used = self._first_table + count * width * 4
        host = torch.empty(used, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        places = self._places(host.numpy())
        for name, values, padding in (
            ("input_ids", numbers.input_ids, 0),
            ("positions", numbers.positions, 0),
            ("kv_slots", numbers.kv_slots, _NOWHERE),
            ("lora_slots", lora_slots, BASE),
            ("context_lens", numbers.context_lens, 0),
        ):
            places[name][:count] = values
            places[name][count:num_rows] = padding
        self._decodes.fill(places, places["context_lens"][:num_rows].astype(np.int64))
        if numbers.unread is not None:
            places["unread_at"][: len(numbers.unread.at)] = numbers.unread.at
            places["unread_of"][: len(numbers.unread.of)] = numbers.unread.of
        tables = host.numpy()[self._first_table :].view(np.int32)
        tables.reshape(count, width)[...] = numbers.tables
        self._buffer[:used].copy_(host, non_blocking=True)
        sent = self._buffer[self._first_table : used].view(torch.int32).view(count, width)
        self.tables[:count, :width].copy_(sent)
        if numbers.unread is not None:
            self._take_unread(numbers.unread)

    def _places(self, host: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        return {
            name: host[field.bytes].view(field.dtype).reshape(field.shape)
            for name, field in self._fields.items()
        }

    def _take_unread(self, unread: UnreadIds) -> None:
        """Have the ids that only the device knows, where they lie."""
        ids, count = self.numbers["input_ids"], len(unread.at)
        is_whole = len(unread.drawn) == count and unread.at[-1] == count - 1
        if is_whole and (unread.of == unread.at).all():
            torch.clamp(unread.drawn, min=0, out=ids[:count])
            return
        at, of = self.numbers["unread_at"][:count], self.numbers["unread_of"][:count]
        ids.index_copy_(0, at, unread.drawn.index_select(0, of).clamp_(min=0))


def _side_by_side(
    shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
) -> tuple[dict[str, _Field], int]:
    """Return where each kind of numbers comes, and where the last one ends."""
    fields, end = dict[str, _Field](), 0
    for name, (dtype, shape) in shapes.items():
        fields[name] = field = _Field(dtype, shape, end)
        end = -(-field.bytes.stop // _ALIGNMENT) * _ALIGNMENT
    return fields, end
