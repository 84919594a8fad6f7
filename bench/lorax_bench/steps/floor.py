"""What a step cannot beat on this machine: its weights once through memory, or their products by a library.

A step's floor is the larger of the two, plus its keys and values through memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lorax_shard.linear.packed import PackedLinear, SiblingKernel
from lorax_shard.linear.registry import BACKENDS

# Whoever wrote them wrote no server. A library's plain product is 'torch'.
LIBRARIES = ("torch", "onednn", "mkl")
_READ_BYTES = 1 << 28


class Library:
    """All linears of a model, computed by one library; the head apart."""

    def __init__(self, name: str, model: Any) -> None:
        """RuntimeError says why it cannot run here."""
        backend = BACKENDS.create(name, torch.device("cpu"), torch.float32)
        head = model.get_output_embeddings()
        self.name = name
        self._linears = [backend.pack(weight, None) for weight in _weights(model, head)]
        self._head = backend.pack(head.weight.detach(), None)
        self._widths = [weight.shape[1] for weight in _weights(model, head)]
        self._head_width = head.weight.shape[1]

    def call(self, num_rows: int, num_logits: int) -> Callable[[], None]:
        """Return what computes them all once."""
        inputs = {width: torch.randn(num_rows, width) for width in {*self._widths}}
        last = torch.randn(num_logits, self._head_width)

        def run() -> None:
            for linear, width in zip(self._linears, self._widths, strict=True):
                linear(inputs[width])
            self._head(last)

        return run


def _weights(model: Any, head: torch.nn.Module) -> list[torch.Tensor]:
    """Return what a step multiplies with before the head; what is stacked, stacked."""
    found: list[torch.Tensor] = []
    groups: set[int] = set()
    for module in model.modules():
        if module is head or not isinstance(module, PackedLinear | torch.nn.Linear):
            continue
        kernel = getattr(module, "kernel", None)
        if isinstance(kernel, SiblingKernel):
            if id(kernel.group) not in groups:
                groups.add(id(kernel.group))
                found.append(kernel.group.kernel.dense())
            continue
        weight: torch.Tensor = module.weight.detach()
        found.append(weight)
    return found


def read_seconds(rounds: int = 7) -> float:
    """Return the seconds that a byte takes through memory, the best of some rounds."""
    data = torch.ones(_READ_BYTES // 4)
    data.sum()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return min(seconds) / _READ_BYTES
