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
_ADDRESSES = ("output_ids", "edit_ids", "edit_values", "preferred")
# Prompts that stay on the device; longer ones are uploaded in each step.
_PROMPT_BYTES = 32 << 20


class _KeptPrompt(NamedTuple):
    on_device: torch.Tensor
    # Its memory on the host: as long as it is held it is nobody else's.
    on_host: object


class KeptPrompts:
    """Prompts of rows whose penalties need them, uploaded once; the least recently used one goes."""

    def __init__(self, max_bytes: int = _PROMPT_BYTES) -> None:
        self._kept: LRUCache[tuple[int, int, torch.device], _KeptPrompt] = LRUCache(
            max_bytes, getsizeof=lambda kept: kept.on_device.nbytes
        )

    @property
    def nbytes(self) -> int:
        """What they take on the device."""
        return int(self._kept.currsize)

    def find(self, ids: NDArray[np.int64], device: torch.device) -> torch.Tensor | None:
        """Return a prompt on the device; None: there is no room for it."""
        key = ids.__array_interface__["data"][0], len(ids), device
        kept = self._kept.get(key)
        if kept is None:
            # Of an empty one there is an address, too.
            host = ids.astype(np.int32) if len(ids) else np.zeros(1, dtype=np.int32)
            if host.nbytes > self._kept.maxsize:
                return None
            kept = _KeptPrompt(to_device(torch.from_numpy(host), device), ids)
            self._kept[key] = kept
        return kept.on_device


class Upload:
    """Arrays that go to a device in one copy; implements Places."""

    def __init__(self, prompts: KeptPrompts, device: torch.device) -> None:
        self._prompts, self._device = prompts, device
        # An address of 0 says that there is nothing.
        self._size = _ALIGNMENT
        self._parts: list[tuple[int, NDArray[Any]]] = []
        # Nobody frees or replaces them before the kernels are launched.
        self._held: list[torch.Tensor] = []

    def place(self, values: NDArray[Any]) -> int:
        """Return where an array will be, from the beginning on; ids as int32."""
        if values.dtype == np.int64:
            values = values.astype(np.int32)
        start = self._size
        self._parts.append((start, values))
        self._size = start + -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT
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
        start = self.place(table)
        memory = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        for name in _ADDRESSES:
            column = table[name]
            column[column > 0] += memory.data_ptr()
        pinned = self._device.type == "cuda"
        host = torch.empty(self._size, dtype=torch.uint8, pin_memory=pinned)
        octets = host.numpy()
        for first, values in self._parts:
            octets[first : first + values.nbytes] = np.ascontiguousarray(values).view(np.uint8)
        memory.copy_(host, non_blocking=True)
        return memory[start:].view(torch.int64)
