"""What rows ask for, on its way to a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray

from lorax_shard.transfer import to_device

# Beginnings of arrays are multiples of it.
_ALIGNMENT = 16
# Fields of a table that say where something lies in what is uploaded with it.
_OF_IDS, _OF_REST = ("output_ids", "edit_ids"), ("edit_values", "preferred", "allowed")
# Prompts that stay on the device; longer ones are uploaded in each step.
_PROMPT_BYTES = 32 << 20


class _KeptPrompt(NamedTuple):
    on_device: torch.Tensor
    # Its memory on the host: as long as it is held it is nobody else's.
    on_host: object


class KeptPrompts:
    """Prompts of rows whose penalties need them, uploaded once; the least recently used one goes."""

    def __init__(self, max_bytes: int = _PROMPT_BYTES) -> None:
        # By where they lie on the host, and how long they are.
        self._kept: LRUCache[tuple[int, int], _KeptPrompt] = LRUCache(
            max_bytes, getsizeof=lambda kept: kept.on_device.nbytes
        )

    @property
    def nbytes(self) -> int:
        """What they take on the device."""
        return int(self._kept.currsize)

    def find(self, ids: NDArray[np.int64], device: torch.device) -> torch.Tensor | None:
        """Return a prompt on the device; None: there is no room for it."""
        key = ids.__array_interface__["data"][0], len(ids)
        try:
            return self._kept[key].on_device
        except KeyError:
            pass
        # Of an empty one there is an address, too.
        host = ids.astype(np.int32) if len(ids) else np.zeros(1, dtype=np.int32)
        if host.nbytes > self._kept.maxsize:
            return None
        on_device = to_device(torch.from_numpy(host), device)
        self._kept[key] = _KeptPrompt(on_device, ids)
        return on_device


class Upload:
    """Arrays that go to a device in one copy; implements Places."""

    def __init__(self, prompts: KeptPrompts, device: torch.device) -> None:
        self._prompts, self._device = prompts, device
        # Ids first, all in a row. An address of 0 says that there is nothing.
        self._ids: list[NDArray[np.int64]] = []
        self._end_of_ids = _ALIGNMENT
        # Then the rest.
        self._rest: list[tuple[int, NDArray[Any]]] = []
        self._size = _ALIGNMENT
        # Nobody frees or replaces them before the kernels are launched.
        self._held: list[torch.Tensor] = []

    def place(self, values: NDArray[Any]) -> int:
        """Return where an array will be, from the beginning of ids or of the rest; ids as int32."""
        if values.dtype == np.int64:
            start = self._end_of_ids
            self._ids.append(values)
            self._end_of_ids = start + 4 * len(values)
            return start
        start = self._size
        self._rest.append((start, values))
        self._size = start + _aligned(values.nbytes)
        return start

    def place_prompt(self, ids: NDArray[np.int64]) -> int:
        """Return where a prompt is."""
        found = self._prompts.find(ids, self._device)
        if found is None:
            found = to_device(torch.from_numpy(ids.astype(np.int32)), self._device)
        self._held.append(found)
        return found.data_ptr()

    def send(self, table: NDArray[np.void]) -> torch.Tensor:
        """Put all of it on the device; return the table there, in which addresses are true."""
        first = _aligned(self._end_of_ids)
        at = first + self.place(table)
        memory = torch.empty(first + self._size, dtype=torch.uint8, device=self._device)
        address = memory.data_ptr()
        for names, base in ((_OF_IDS, address), (_OF_REST, address + first)):
            for name in names:
                column = table[name]
                column[column > 0] += base
        pinned = self._device.type == "cuda"
        host = torch.empty(len(memory), dtype=torch.uint8, pin_memory=pinned)
        octets = host.numpy()
        if self._ids:
            ids = octets[_ALIGNMENT : self._end_of_ids].view(np.int32)
            np.concatenate(self._ids, out=ids, casting="unsafe")
        for start, values in self._rest:
            values = np.ascontiguousarray(values).view(np.uint8)
            octets[first + start : first + start + len(values)] = values
        memory.copy_(host, non_blocking=True)
        return memory[at:].view(torch.int64)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
