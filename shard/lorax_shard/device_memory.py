"""What the memory of a device holds: measured here, judged elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil
import torch

from lorax_shard import system_memory

_SAMPLE_INTERVAL_S = 0.002


def total_bytes(device: torch.device) -> int:
    """Return the bytes that the device has; on a CPU not more than the container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return system_memory.total_bytes()


def free_bytes(device: torch.device) -> int:
    """Return the bytes of the device that nobody has taken."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return system_memory.available_bytes()


def taken_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that torch holds in this process, 0 on a CPU.

    CUDA's own context is not among them: torch does not know its size.
    """
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else 0


def measure_peak(device: torch.device, run: Callable[[], object]) -> int:
    """Return how many bytes ``run`` needs beside what stays when it has ended.

    On a CPU that is by how much the process grew at most, whatever it keeps.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        # What stays (workspaces of libraries) counts as taken from now on, and not twice.
        return int(torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device))
    return _resident_peak(run)


def _resident_peak(run: Callable[[], object]) -> int:
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_INTERVAL_S):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, name="memory-watch", daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return int(max(peak, process.memory_info().rss) - before)
