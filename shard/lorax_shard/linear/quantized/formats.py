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
    """One way to store numbers; ``index`` is its place in ``quantized.cpp``, below 0 if it has none."""

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
# What operations of torch compute on GPUs (``device.py``): E4M3 numbers with a scale for each row, and
# codes of -8 to 7 in groups of inputs.
FP8 = Format("fp8", -1, None, 8, torch.float32, has_offset=False)
INT4 = Format("int4", -1, 32, 4, torch.bfloat16, has_offset=True)
# The largest number of E4M3.
MOST_FP8 = 448.0
# Shares of a group's range that its 16 steps may cover.
_WIDTHS = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight (out x in) as codes; groups divide its inputs."""

    format: Format
    # Signed bytes, or numbers of 8 or 16 bits.
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


# Whole numbers of so many bytes: torch joins them on any device.
_WHOLE = {1: torch.uint8, 2: torch.int16}


def stack(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Return weights of one format one below the other; None for different ones."""
    first = weights[0]
    if any(each.format is not first.format for each in weights):
        return None
    return QuantizedWeight(
        first.format,
        torch.cat([each.codes.view(_WHOLE[each.codes.itemsize]) for each in weights]).view(
            first.codes.dtype
        ),
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
    scales = _row_scales(weight, largest, 127)
    codes = (weight / scales).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight(INT8, codes, scales)


def to_bfloat16(weight: torch.Tensor) -> QuantizedWeight:
    """Round each number to bfloat16."""
    return QuantizedWeight(BFLOAT16, weight.to(torch.bfloat16))


def to_fp8(weight: torch.Tensor, largest: torch.Tensor | None = None) -> QuantizedWeight:
    """Round each row to E4M3 numbers times its own scale; ``largest`` as for ``to_int8``."""
    weight = weight.float()
    scales = _row_scales(weight, largest, MOST_FP8)
    codes = (weight / scales).clamp_(-MOST_FP8, MOST_FP8).to(torch.float8_e4m3fn)
    return QuantizedWeight(FP8, codes, scales)


def to_int4(weight: torch.Tensor) -> QuantizedWeight:
    """Round groups of inputs to 16 steps between about the least and the largest of their numbers.

    Of several widths each group takes that which its numbers are nearest to.
    """
    groups = weight.float().reshape(weight.shape[0], -1, INT4.group_size)
    best: tuple[torch.Tensor, ...] = ()
    for width in _WIDTHS:
        found = _sixteen_steps(groups, width)
        if not best:
            best = found
        is_nearer = found[0] < best[0]
        for kept, new in zip(best, found, strict=True):
            kept[is_nearer] = new[is_nearer]
    _, codes, scales, offsets = best
    return QuantizedWeight(INT4, codes.flatten(1), scales, offsets)


def _sixteen_steps(groups: torch.Tensor, width: float) -> tuple[torch.Tensor, ...]:
    """Return the squares of what is off, codes, scales and offsets of groups (out x groups x inputs)."""
    least, most = groups.amin(dim=2) * width, groups.amax(dim=2) * width
    scales = ((most - least) / 15).to(INT4.numbers)
    # All of a group are alike.
    scales = torch.where(scales > 0, scales, 1.0)
    # What the code 0 stands for.
    offsets = (least + 8 * scales.float()).to(INT4.numbers)
    step, zero = scales.float().unsqueeze(2), offsets.float().unsqueeze(2)
    codes = ((groups - zero) / step).round_().clamp_(-8, 7)
    off = (codes * step + zero - groups).square().sum(dim=2)
    return off, codes.to(torch.int8), scales, offsets


def _row_scales(weight: torch.Tensor, largest: torch.Tensor | None, most: float) -> torch.Tensor:
    """Return the scale (out x 1) that makes ``most`` of what is largest in each row."""
    if largest is None:
        largest = weight.abs().amax(dim=1)
    scales = largest.float().unsqueeze(1) / most
    # A row of zeros.
    return torch.where(scales > 0, scales, 1.0)
