"""How the numbers of a quantized weight are stored: codes, and what stretches them.

A number is ``code x scale + offset`` in float32. Scales and offsets belong to one row of the
weight and to all inputs, or to a group of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store numbers; ``index`` is its place in ``quantized.cpp``."""

    name: str
    index: int
    # Inputs that share a scale; None: all of a row.
    group: int | None
    bits: int
    # Of scales and offsets; None: the codes are numbers as they are.
    numbers: torch.dtype | None
    has_offset: bool

    @property
    def group_size(self) -> int:
        """Inputs whose codes lie together."""
        return self.group or 1

    @property
    def is_channelwise(self) -> bool:
        """Whether one scale stands for a whole row, and is applied to its sum."""
        return self.group is None and self.numbers is not None


INT8 = Format("int8", 0, None, 8, torch.float32, has_offset=False)
BFLOAT16 = Format("bfloat16", 1, None, 16, None, has_offset=False)
Q4_0 = Format("Q4_0", 2, 32, 4, torch.float16, has_offset=False)
Q4_1 = Format("Q4_1", 3, 32, 4, torch.float16, has_offset=True)
Q8_0 = Format("Q8_0", 4, 32, 8, torch.float16, has_offset=False)
# Superblocks whose scales have scales of their own: the products are kept.
NIBBLES = Format("4 bits, groups of 32", 5, 32, 4, torch.float32, has_offset=True)
BYTES = Format("8 bits, groups of 16", 6, 16, 8, torch.float32, has_offset=True)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight (out x in) as codes; groups divide its inputs."""

    format: Format
    # Signed bytes, or what bfloat16 numbers are.
    codes: torch.Tensor  # out x in
    # out x groups, or out x 1.
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """Return the numbers in float32: what takes part in every product."""
        if self.scales is None:
            return self.codes.float()
        num_out, num_in = self.codes.shape
        codes = self.codes.view(num_out, self.scales.shape[1], -1).float()
        numbers = codes * self.scales.float().unsqueeze(-1)
        if self.offsets is not None:
            # One rounding, as in the kernel: a product of code and scale is exact.
            numbers += self.offsets.float().unsqueeze(-1)
        return numbers.view(num_out, num_in)


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Return weights of one format one below the other; None for different ones."""
    first = weights[0]
    if any(each.format is not first.format for each in weights):
        return None
    return QuantizedWeight(
        first.format,
        torch.cat([each.codes for each in weights]),
        _joined([each.scales for each in weights]),
        _joined([each.offsets for each in weights]),
    )


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def to_int8(weight: torch.Tensor, largest: torch.Tensor | None = None) -> QuantizedWeight:
    """Round each row to whole numbers of up to 127 times its own scale.

    ``largest``: what is largest in each row (out), signs left aside, where ``weight`` has some of
    the inputs only: its codes are then those that the whole weight has.
    """
    weight = weight.float()
    if largest is None:
        largest = weight.abs().amax(dim=1)
    scales = largest.float().unsqueeze(1) / 127
    # A row of zeros.
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (weight / scales).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(INT8, codes, scales)


def to_bfloat16(weight: torch.Tensor) -> QuantizedWeight:
    """Round each number to bfloat16."""
    return QuantizedWeight(BFLOAT16, weight.to(torch.bfloat16))
