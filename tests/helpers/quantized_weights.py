"""Random weights in each format that a quantized linear computes with."""

from __future__ import annotations

import torch

from lorax_shard.linear.quantized import formats
from lorax_shard.linear.quantized.formats import Format, QuantizedWeight

FORMATS = (
    formats.INT8, formats.BFLOAT16, formats.Q4_0, formats.Q4_1, formats.Q8_0, formats.NIBBLES,
    formats.BYTES,
)  # fmt: skip


def random_weight(format_: Format, num_out: int, num_in: int) -> QuantizedWeight:
    """Return a weight whose codes take every value that the format has."""
    if format_ is formats.BFLOAT16:
        return formats.to_bfloat16(torch.randn(num_out, num_in))
    lowest, highest = {4: (0, 16) if format_.has_offset else (-8, 8), 8: (-128, 128)}[format_.bits]
    codes = torch.randint(lowest, highest, (num_out, num_in)).to(torch.int8)
    shape = (num_out, 1 if format_.group is None else num_in // format_.group)
    assert format_.numbers is not None
    # 16-bit scales that are too small to be normal numbers are among them.
    scales = torch.rand(shape).pow(8).to(format_.numbers)
    offsets = torch.randn(shape).to(format_.numbers) if format_.has_offset else None
    return QuantizedWeight(format_, codes, scales, offsets)
