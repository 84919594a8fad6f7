"""Blocks of GGUF files become codes without a change of any number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from lorax_shard.linear.quantized.gguf_blocks import _TYPES, BLOCK_TYPES, decode
from lorax_shard.linear.quantized.kernel import QuantizedPacker, load_quantized

# Where the 16-bit floats of a block are.
_HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def random_rows(type_name: str, num_out: int, num_in: int) -> np.ndarray:
    """Return rows of blocks of random bytes, whose shared numbers are finite."""
    draw = np.random.default_rng(0)
    kind = _TYPES[type_name]
    blocks = draw.integers(0, 256, (num_out * num_in // kind.inputs, kind.num_bytes), np.uint8)
    for start in _HALVES[type_name]:
        scales = (draw.normal(size=len(blocks)) * 0.01).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(num_out, -1)


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_every_type_keeps_its_numbers_to_the_bit(type_name: str) -> None:
    rows = random_rows(type_name, 48, 512)
    expected = torch.from_numpy(dequantize(rows, GGMLQuantizationType[type_name]))
    weight = decode(torch.from_numpy(rows), type_name)
    assert torch.equal(weight.dense(), expected)


@pytest.mark.parametrize("type_name", BLOCK_TYPES)
def test_every_type_is_computed_as_its_dequantized_weight(type_name: str) -> None:
    library, reason = load_quantized()
    if library is None:
        pytest.skip(str(reason))
    rows = random_rows(type_name, 48, 512)
    expected = torch.from_numpy(dequantize(rows, GGMLQuantizationType[type_name]))
    kernel = QuantizedPacker(library).pack(decode(torch.from_numpy(rows), type_name), None)
    assert torch.equal(kernel.dense(), expected)
    for num_rows in (1, 9, 40):
        x = torch.randn(num_rows, 512)
        exact = (x.double() @ expected.double().T).float()
        scale = expected.abs().max().item() * 512**0.5
        torch.testing.assert_close(kernel(x), exact, rtol=1e-5, atol=2e-6 * scale)
