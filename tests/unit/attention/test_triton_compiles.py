"""The attention kernels as a GPU would get them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.fake_gpu import run_on_fake_gpu

pytest.importorskip("triton", reason="triton does not run on this platform")

# After the question whether it can be.
from lorax_shard.attention.triton.backend import _DECODE_HALF

# What the smallest supported GPUs give a program.
SHARED_MEMORY = 99 << 10
# Bytes of a thread that may lie outside its registers: a few values, as releases differ in them.
SPILLS = 32
# Registers of a processor.
REGISTERS = 64 << 10

# Compiling takes a minute or two, and much longer on a machine that is busy with other work.
pytestmark = pytest.mark.timeout(900)
KERNELS = {"store", "prompt", "decode", "combine"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "dtype", "kv_dtype", "everything", "capability"),
    [
        (128, "bfloat16", "bfloat16", False, 90),
        (128, "bfloat16", "float8_e4m3fn", False, 90),
        (256, "bfloat16", "bfloat16", False, 90),
        (128, "float32", "float32", False, 90),
        (24, "float16", "float16", True, 80),
    ],
)
def test_every_kernel_fits_a_gpu(
    head_dim: int, dtype: str, kv_dtype: str, everything: bool, capability: int, tmp_path: Path
) -> None:
    """In its registers, and in the shared memory of the smallest."""
    binaries = run_on_fake_gpu(
        "tests.helpers.gpu_launches:attention_kernels", head_dim, dtype, kv_dtype, everything,
        cache=tmp_path, capability=capability,
    )  # fmt: skip
    assert {binary.kernel for binary in binaries} == KERNELS
    assert [binary for binary in binaries if binary.stack > SPILLS] == []
    assert max(binary.shared for binary in binaries) <= SHARED_MEMORY


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decodes_load_a_tile_ahead_and_leave_room_for_four_programs(
    head_dim: int, tmp_path: Path
) -> None:
    """Where loads wait for products, or few programs are on a processor, its memory idles."""
    binaries = run_on_fake_gpu(
        "tests.helpers.gpu_launches:attention_kernels", head_dim, "bfloat16", "bfloat16", False,
        cache=tmp_path,
    )  # fmt: skip
    tile = _DECODE_HALF[head_dim]
    two_tiles = 2 * 2 * tile.block_n * head_dim * torch.bfloat16.itemsize
    decodes = [binary for binary in binaries if binary.kernel == "decode"]
    assert len(decodes) == 2
    for binary in decodes:
        assert binary.shared >= two_tiles
        assert 4 * binary.registers * 32 * tile.num_warps <= REGISTERS
        assert 4 * binary.shared <= 227 << 10
