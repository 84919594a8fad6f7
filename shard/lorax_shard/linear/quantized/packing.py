"""A quantized weight in the order in which ``quantized.cpp`` reads it, and back."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional

from lorax_shard.linear.quantized.formats import Format, QuantizedWeight

# Inputs of a block, as in quantized.cpp.
_DEPTH = 128
_CODES_A_WORD = 8
_SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)
# Codes of four bits without an offset stand for -8 to 7.
_LOWEST = -8


def group_bytes(format_: Format, columns: int) -> int:
    """Return the bytes of one group of one panel."""
    return _shared_bytes(format_, columns) + format_.group_size * columns * format_.bits // 8


def packed_bytes(format_: Format, shape: torch.Size, columns: int) -> int:
    """Return the bytes of a weight of this shape."""
    num_panels = -(-shape[0] // columns)
    return num_panels * (shape[1] // format_.group_size) * group_bytes(format_, columns)


def pack(weight: QuantizedWeight, columns: int, memory: torch.Tensor) -> None:
    """Fill ``memory``, as many bytes as ``packed_bytes`` says."""
    num_out, num_in = weight.codes.shape
    missing = -num_out % columns
    num_panels = (num_out + missing) // columns
    group = weight.format.group_size

    def panels(rows: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return columns ``first`` to ``last`` of some rows: panels x columns x inputs."""
        part = functional.pad(rows[:, first:last], (0, 0, 0, missing))
        return part.view(num_panels, columns, last - first)

    for first, block in _blocks(weight.format, num_in, num_panels, columns, memory):
        last = min(first + _DEPTH, num_in)
        start = 0
        if weight.format.group is not None:
            for numbers in (weight.scales, weight.offsets):
                if numbers is not None:
                    shared = panels(numbers, first // group, last // group).transpose(1, 2)
                    as_bytes = shared.contiguous().view(torch.uint8)
                    block[..., start : start + as_bytes.shape[-1]] = as_bytes
                    start += as_bytes.shape[-1]
        codes = panels(weight.codes, first, last).transpose(1, 2)
        codes = codes.reshape(num_panels, -1, group, columns)
        if weight.format.bits == 4:
            codes = _to_words(codes - (0 if weight.format.has_offset else _LOWEST))
        block[..., start:] = codes.contiguous().view(torch.uint8).flatten(2)


def unpack(
    format_: Format, shape: torch.Size, columns: int, memory: torch.Tensor
) -> QuantizedWeight:
    """Return what was packed, scales of whole rows left out."""
    num_out, num_in = shape
    num_panels = -(-num_out // columns)
    dtype = torch.bfloat16 if format_.bits == 16 else torch.int8
    codes = torch.empty(num_panels * columns, num_in, dtype=dtype)
    has_groups = format_.group is not None
    num_groups = num_in // format_.group_size
    # Scales, then offsets.
    shared = [
        torch.empty(num_panels * columns, num_groups, dtype=format_.numbers)
        for _ in range((1 + format_.has_offset) * has_groups)
    ]
    for first, block in _blocks(format_, num_in, num_panels, columns, memory):
        groups = slice(first // format_.group_size, first // format_.group_size + block.shape[1])
        start = 0
        for numbers in shared:
            width = columns * numbers.itemsize
            part = block[..., start : start + width].contiguous().view(numbers.dtype)
            numbers[:, groups] = part.transpose(1, 2).flatten(0, 1)
            start += width
        part = block[..., start:].contiguous()
        if format_.bits == 4:
            nibbles = _from_words(part.view(torch.int32), columns)
            part = nibbles + (0 if format_.has_offset else _LOWEST)
        inputs = part.view(dtype).view(num_panels, -1, columns)
        codes[:, first : first + inputs.shape[1]] = inputs.transpose(1, 2).flatten(0, 1)
    return QuantizedWeight(format_, codes[:num_out], *(numbers[:num_out] for numbers in shared))


def _blocks(
    format_: Format, num_in: int, num_panels: int, columns: int, memory: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each block's first input and its part of the memory: panels x groups x bytes."""
    size = group_bytes(format_, columns)
    start = 0
    for first in range(0, num_in, _DEPTH):
        num_groups = (min(first + _DEPTH, num_in) - first) // format_.group_size
        num_bytes = num_panels * num_groups * size
        yield first, memory[start : start + num_bytes].view(num_panels, num_groups, size)
        start += num_bytes


def _shared_bytes(format_: Format, columns: int) -> int:
    if format_.group is None or format_.numbers is None:
        return 0
    return (1 + format_.has_offset) * columns * format_.numbers.itemsize


def _to_words(codes: torch.Tensor) -> torch.Tensor:
    """Put eight codes (panels x groups x inputs x columns) of each column into a word."""
    num_panels, num_groups, size, columns = codes.shape
    per_word = codes.view(num_panels, num_groups, size // _CODES_A_WORD, _CODES_A_WORD, columns)
    shifted = per_word.to(torch.int32) << _SHIFTS.view(-1, 1)
    return shifted.sum(dim=3, dtype=torch.int32)


def _from_words(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Return eight codes of each word (panels x groups x words) as bytes."""
    per_column = words.view(*words.shape[:2], -1, 1, columns)
    return ((per_column >> _SHIFTS.view(-1, 1)) & 15).to(torch.int8)
