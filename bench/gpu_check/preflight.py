"""What the machine can do: the ceilings of all that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from bench.gpu_check.measure import Graphs, seconds
from bench.gpu_check.models import device_of
from bench.gpu_check.report import Report

_GRAPH_NODES = 1000


class Ceilings(NamedTuple):
    """What a step's floor is counted with."""

    read_bytes_s: float
    flops: float


class PreflightSizes(NamedTuple):
    """What is copied, read and multiplied."""

    nbytes: int
    side: int
    dtype: torch.dtype


FULL = PreflightSizes(1 << 32, 8192, torch.bfloat16)
SMALL = PreflightSizes(1 << 22, 256, torch.float32)


def run(report: Report, *, small: bool) -> None:
    """Measure, and say what was measured."""
    sizes, device = SMALL if small else FULL, device_of(small)
    ceilings = measure(sizes, device)
    report.table("Ceilings", ("what", "value"))
    report.row("read, GB/s", ceilings.read_bytes_s / 1e9)
    report.row("copy, bytes read and written, GB/s", copied_bytes_s(sizes.nbytes, device) / 1e9)
    what = f"product of {sizes.side} x {sizes.side}, {str(sizes.dtype)[6:]}, TFLOP/s"
    report.row(what, ceilings.flops / 1e12)
    node = Graphs(report, device).seconds(many_launches(device))
    report.row(f"a node of a graph of {_GRAPH_NODES}, µs", node and node / _GRAPH_NODES * 1e6)
    launch = seconds(many_launches(device), device, most=5) / _GRAPH_NODES
    report.row("a launch from Python, µs", launch * 1e6)


def measure(sizes: PreflightSizes, device: torch.device) -> Ceilings:
    """Return the rates of reading alone, by the best of several ways, and of multiplying."""
    read_bytes_s = read_alone_bytes_s(sizes.nbytes, device)
    side = sizes.side
    a, b = (torch.randn(side, side, device=device, dtype=sizes.dtype) for _ in range(2))
    return Ceilings(read_bytes_s, 2 * side**3 / seconds(lambda: a @ b, device))


def read_alone_bytes_s(nbytes: int, device: torch.device) -> float:
    """Return the best rate at which numbers are read that are not written anywhere."""
    source = torch.zeros(nbytes // 4, device=device)
    ways = (source.sum, source.max, lambda: torch.linalg.vector_norm(source))
    return nbytes / min(seconds(way, device, budget_s=0.3, most=10) for way in ways)


def copied_bytes_s(nbytes: int, device: torch.device) -> float:
    """Return the rate of a copy on the device."""
    source = torch.zeros(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds(lambda: target.copy_(source), device, budget_s=0.3)


def many_launches(device: torch.device) -> Callable[[], None]:
    """Return a call of very many very small kernels."""
    number = torch.zeros(1, device=device)

    def call() -> None:
        for _ in range(_GRAPH_NODES):
            number.add_(1)

    return call
