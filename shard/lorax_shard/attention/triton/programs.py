"""How many programs compute a decode row, and how many a device computes at once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Query heads that one program of the decode kernel computes at most.
_DECODE_HEADS = 64
# In the interpreter, whose programs run one after the other.
_CPU_PROCESSORS = 8


class DecodePrograms(NamedTuple):
    """How the query heads of a decode row are shared out."""

    # Query heads of a KV head.
    group: int
    # Of them those that one program computes.
    heads: int
    # Programs of one split.
    programs: int


def decode_programs(num_heads: int, num_kv_heads: int) -> DecodePrograms:
    """Return how many programs compute one split of a decode row."""
    group = num_heads // num_kv_heads
    heads = min(group, _DECODE_HEADS)
    return DecodePrograms(group, heads, num_kv_heads * -(-group // heads))


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return how many processors a device has; in the interpreter a few."""
    if device.type != "cuda":
        return _CPU_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
