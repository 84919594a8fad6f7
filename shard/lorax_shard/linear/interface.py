"""What a way to compute ``y = x·Wᵀ + b`` must offer.

Shapes: W is out x in, b is out, x is ... x in, y is ... x out; any number of rows, none
included. Results equal ``torch.nn.functional.linear`` up to rounding (1e-5 relative in
float32). Weights are constant: nothing here computes gradients.
"""

from __future__ import annotations

from typing import Protocol

import torch


class LinearKernel(Protocol):
    """One weight matrix in the form that its backend computes with."""

    # Bytes that the kernel holds, the bias left out.
    nbytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:  # ... x in -> ... x out
        """Compute the linear for all rows of ``x``."""

    def dense(self) -> torch.Tensor:  # out x in
        """Return the plain weight; may have to make it."""


class LinearBackend(Protocol):
    """Makes kernels of one kind."""

    name: str
    # Whether its kernels go on using the plain weight, beside a packed form or as their only one.
    keeps_plain: bool

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearKernel:
        """Return a kernel for ``weight`` (out x in); may keep the tensor itself."""


class NamedLinearBackend(LinearBackend, Protocol):
    """One of the registry's."""

    # Backends that it does the same as, or better: where it can run they need not be measured.
    supersedes: tuple[str, ...]
    # Whether a pass whose products are of its kernels can be a program.
    in_programs: bool

    @classmethod
    def probe(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return in words why this backend cannot run here, or None when it can."""
