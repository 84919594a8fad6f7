"""Numbers on their way from the host to a device."""

from __future__ import annotations

import torch


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device; nobody waits for the copy, nor for what is before it."""
    if device.type != "cuda":
        return host.to(device)
    # From other memory the copy would wait until the device has done all that it was given.
    return host.pin_memory().to(device, non_blocking=True)
