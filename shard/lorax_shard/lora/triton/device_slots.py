"""The slots of all groups of a model on the device: one line a slot, copied as a whole."""

from __future__ import annotations

import torch

from lorax_shard.lora.slot_table import SlotTable


class DeviceSlots:
    """Owns the copy of a slot table that kernels read."""

    def __init__(self) -> None:
        self.table = SlotTable()
        self.lines = torch.empty(0, 0, dtype=torch.int64)
        # How often these were made anew, elsewhere.
        self.version = 0

    def reserve(self, num_lines: int, device: torch.device) -> None:
        """Have lines for so many slots: their address stays until there are more."""
        self.table.grow(num_lines)
        self.commit(device)

    def commit(self, device: torch.device) -> None:
        """Copy the lines that were written since the last time: one copy for neighbours.

        Nothing waits for the device: what is on its queue still reads the old lines.
        """
        if self.lines.shape != self.table.lines.shape:
            # Also where inference mode is on now: it may be off when the next line is written.
            with torch.inference_mode(False):
                self.lines = torch.from_numpy(self.table.lines).to(device, copy=True)
            self.version += 1
        else:
            for first, last in _runs(self.table.changed):
                # A copy: what is on its way is not what is written next.
                lines = torch.tensor(self.table.lines[first:last])
                lines = lines.pin_memory() if device.type == "cuda" else lines
                self.lines[first:last].copy_(lines, non_blocking=True)
        self.table.changed.clear()


def _runs(numbers: set[int]) -> list[tuple[int, int]]:
    """Return neighbours among numbers as ranges, the ends excluded."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
