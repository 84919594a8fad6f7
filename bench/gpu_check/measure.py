"""How long calls take on a device, alone and as captured graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from bench.gpu_check.report import Report


def seconds(
    call: Callable[[], object], device: torch.device, *, budget_s: float = 0.5, most: int = 30
) -> float:
    """Return the median time of a call after two to warm up: of a device its own time."""
    call()
    call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < most and time.perf_counter() - started < budget_s):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def host_seconds(call: Callable[[], object], device: torch.device, count: int = 20) -> float:
    """Return the median time until a call returns, while the device has nothing to do before it."""
    times: list[float] = []
    for _ in range(count):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def capture(call: Callable[[], Any]) -> Callable[[], None]:
    """Return the replay of a call's kernels on a GPU, after two calls that compile and make room."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Graphs:
    """Times calls as captured graphs; one that cannot be captured leaves one cell empty."""

    def __init__(self, report: Report, device: torch.device) -> None:
        self._report, self._device = report, device
        self._told: set[str] = set()

    def seconds(self, call: Callable[[], object]) -> float | None:
        """Return the time of a replay; None where there is none."""
        if self._device.type != "cuda":
            return None
        return self._tried(lambda: seconds(capture(call), self._device))

    def per_call(self, call: Callable[[], object], count: int) -> float | None:
        """Return the time of one of ``count`` calls in a row, on a GPU without the host's part.

        None where that fails: not every launch size fits a GPU.
        """

        def many() -> None:
            for _ in range(count):
                call()

        if self._device.type == "cuda":
            took = self.seconds(many)
        else:
            took = self._tried(lambda: seconds(many, self._device, budget_s=0.3))
        return None if took is None else took / count

    def _tried(self, measure: Callable[[], float]) -> float | None:
        try:
            return measure()
        except Exception as error:  # noqa: BLE001 - any backend may be what cannot be captured
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if words not in self._told:
                self._told.add(words)
                self._report.note(f"it cannot be measured as a graph: {words}")
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            return None


class Launches(NamedTuple):
    """What a call puts on a device's queue."""

    # By the kernel's name: how many, and their seconds together.
    kernels: dict[str, tuple[int, float]]

    @property
    def num(self) -> int:
        """All launches, copies among them."""
        return sum(count for count, _ in self.kernels.values())


def launches(call: Callable[[], object], device: torch.device) -> Launches:
    """Profile a call; on a CPU what counts is torch's operators."""
    from torch.profiler import ProfilerActivity, profile

    is_gpu = device.type == "cuda"
    call()
    with profile(
        activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]
    ) as profiler:
        call()
        if is_gpu:
            torch.cuda.synchronize()
    kernels: dict[str, tuple[int, float]] = {}
    for event in profiler.key_averages():
        took = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        if took > 0:
            kernels[event.key] = (event.count, took / 1e6)
    return Launches(kernels)
