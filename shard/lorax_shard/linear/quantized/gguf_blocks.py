"""The blocks of GGUF files as codes, scales and offsets: the same numbers, none of them rounded.

A row of a tensor is blocks one after the other. Each block is some inputs: what they share, and a
few bits of each. Types whose scales have scales of their own keep the products, which float32 holds
exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from lorax_shard.linear.quantized import formats
from lorax_shard.linear.quantized.formats import Format, QuantizedWeight

# Inputs of a block of the types whose name ends in K, and of all others.
_LARGE, _SMALL = 256, 32


class _Parts(NamedTuple):
    """Of some blocks: codes (blocks x inputs), scales and offsets (blocks x groups)."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


class _BlockType(NamedTuple):
    """How the blocks of one type are read."""

    inputs: int
    num_bytes: int
    format: Format
    read: Callable[[torch.Tensor], _Parts]


def decode(rows: torch.Tensor, type_name: str) -> QuantizedWeight:
    """Return the weight whose rows are blocks of a type (out x bytes)."""
    kind = _TYPES[type_name]
    num_out = rows.shape[0]
    codes, scales, offsets = kind.read(rows.reshape(-1, kind.num_bytes))
    if kind.format.group == 16 and scales.shape[1] * 16 != kind.inputs:
        # Wider groups become several.
        repeats = kind.inputs // 16 // scales.shape[1]
        scales = scales.repeat_interleave(repeats, dim=1)
        offsets = None if offsets is None else offsets.repeat_interleave(repeats, dim=1)
    if kind.format.has_offset and offsets is None:
        offsets = torch.zeros_like(scales)
    numbers = kind.format.numbers
    return QuantizedWeight(
        kind.format,
        codes.to(torch.int8).view(num_out, -1),
        scales.to(numbers).view(num_out, -1),
        None if offsets is None else offsets.to(numbers).view(num_out, -1),
    )


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return 16-bit floats that begin at a byte of each block: blocks x 1."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the low halves of some bytes of each block, then the high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return (packed >> places) & 1


def _read_q4_0(blocks: torch.Tensor) -> _Parts:
    return _Parts(_nibbles(blocks[:, 2:]).to(torch.int8) - 8, _half(blocks, 0), None)


def _read_q4_1(blocks: torch.Tensor) -> _Parts:
    return _Parts(_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2))


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Return a bit for each of the 32 inputs of a block, in the place of the fifth."""
    return _bits(packed.unsqueeze(-1), torch.arange(8, dtype=torch.uint8)).flatten(1) << 4


def _read_q5_0(blocks: torch.Tensor) -> _Parts:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return _Parts(codes.to(torch.int8) - 16, _half(blocks, 0), None)


def _read_q5_1(blocks: torch.Tensor) -> _Parts:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return _Parts(codes, _half(blocks, 0), _half(blocks, 2))


def _read_q8_0(blocks: torch.Tensor) -> _Parts:
    return _Parts(blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0), None)


def _scales_of_eight(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and offsets of eight groups: two 16-bit floats times six bits each."""
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (last & 15) | (first >> 6 << 4)), dim=1)
    offsets = torch.cat((second & 63, (last >> 4) | (second >> 6 << 4)), dim=1)
    return (
        _half(blocks, 0).float() * scales.float(),
        -(_half(blocks, 2).float() * offsets.float()),
    )


def _read_q4_k(blocks: torch.Tensor) -> _Parts:
    codes = _nibbles(blocks[:, 16:].view(-1, 4, 32)).flatten(1)
    return _Parts(codes, *_scales_of_eight(blocks))


def _read_q5_k(blocks: torch.Tensor) -> _Parts:
    low = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    high = _bits(blocks[:, None, 16:48], torch.arange(8, dtype=torch.uint8).view(8, 1))
    return _Parts((low | high << 4).flatten(1), *_scales_of_eight(blocks))


def _read_q6_k(blocks: torch.Tensor) -> _Parts:
    # Two halves of 128 inputs: 64 bytes of low bits, 32 of high ones.
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].view(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | high << 4).to(torch.int8) - 32
    own = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _Parts(codes.flatten(1), _half(blocks, 208).float() * own, None)


_TYPES = {
    "Q4_0": _BlockType(_SMALL, 18, formats.Q4_0, _read_q4_0),
    "Q4_1": _BlockType(_SMALL, 20, formats.Q4_1, _read_q4_1),
    "Q5_0": _BlockType(_SMALL, 22, formats.BYTES, _read_q5_0),
    "Q5_1": _BlockType(_SMALL, 24, formats.BYTES, _read_q5_1),
    "Q8_0": _BlockType(_SMALL, 34, formats.Q8_0, _read_q8_0),
    "Q4_K": _BlockType(_LARGE, 144, formats.NIBBLES, _read_q4_k),
    "Q5_K": _BlockType(_LARGE, 176, formats.BYTES, _read_q5_k),
    "Q6_K": _BlockType(_LARGE, 210, formats.BYTES, _read_q6_k),
}
# Types whose blocks a kernel computes with.
BLOCK_TYPES = tuple(_TYPES)


def block_size(type_name: str) -> tuple[int, int]:
    """Return the inputs of a block and its bytes: a row can be cut between blocks only."""
    kind = _TYPES[type_name]
    return kind.inputs, kind.num_bytes
