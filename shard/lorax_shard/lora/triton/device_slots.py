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
        """Copy the lines that were written since the last time: one copy a slot.

        Nothing waits for the device: what is on its queue still reads the old lines.
        """
        if self.lines.shape != self.table.lines.shape:
            # Also where inference mode is on now: it may be off when the next line is written.
            with torch.inference_mode(False):
                self.lines = torch.from_numpy(self.table.lines).to(device, copy=True)
            self.version += 1
        else:
            for slot in self.table.changed:
                # A copy: what is on its way is not what is written next.
                line = torch.tensor(self.table.lines[slot])
                line = line.pin_memory() if device.type == "cuda" else line
                self.lines[slot].copy_(line, non_blocking=True)
        self.table.changed.clear()
