"""Numbers on their way from the host to a device, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Arrays that travel together begin at multiples of this: kernels read them in whole lines.
_ALIGNMENT = 16


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device; nobody waits for the copy, nor for what is before it."""
    if device.type != "cuda":
        return host.to(device)
    # From other memory the copy would wait until the device has done all that it was given.
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return where numbers of a device will be on the host, and what says that they are there.

    None: they are there already.
    """
    if tensor.device.type != "cuda":
        return tensor, None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event: Any = torch.cuda.Event
    arrived = event()
    arrived.record()
    return host, arrived


def all_to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """Return arrays of the host on a device, in one transfer that nobody waits for."""
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    packed, starts = pack(arrays)
    moved = to_device(torch.from_numpy(packed), device)
    return [
        moved[start : start + array.nbytes].view(torch_dtype(array.dtype)).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def pack(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the bytes of arrays side by side, and where each begins."""
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = np.empty(end, dtype=np.uint8)
    for array, start in zip(arrays, starts, strict=True):
        packed[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    return packed, starts


def torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """Return torch's name of a dtype of whole numbers."""
    return torch.from_numpy(np.empty(0, dtype=dtype)).dtype
