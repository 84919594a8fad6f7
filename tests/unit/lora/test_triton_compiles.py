"""The LoRA kernels as a GPU would get them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.fake_gpu import run_on_fake_gpu

pytest.importorskip("triton", reason="triton does not run on this platform")

# What the smallest supported GPUs give a program.
SHARED_MEMORY = 99 << 10
# Bytes of a thread that may lie outside its registers: a value or two, as releases differ in them.
SPILLS = 16

# Compiling takes a minute or two, and much longer on a machine that is busy with other work.
pytestmark = pytest.mark.timeout(900)


@pytest.mark.slow
def test_every_kernel_fits_a_gpu_and_reads_matrices_in_whole_lines(tmp_path: Path) -> None:
    """In its registers, in the shared memory of the smallest, and 16 bytes at a time."""
    binaries = run_on_fake_gpu(
        "tests.helpers.gpu_launches:lora_kernels", "bfloat16", cache=tmp_path
    )
    assert {binary.kernel for binary in binaries} == {"gather_rows", "shrink", "expand"}
    assert [binary for binary in binaries if binary.stack > SPILLS] == []
    assert max(binary.shared for binary in binaries) <= SHARED_MEMORY
    assert [binary for binary in binaries if binary.narrow_loads] == []
    assert all(binary.wide_loads for binary in binaries if binary.kernel != "gather_rows")
    # Four programs of eight warps fit the registers of a processor; long prompts take more.
    few, _ = sorted(binary.registers for binary in binaries if binary.kernel == "expand")
    assert 4 * few * 32 * 8 <= 64 << 10


@pytest.mark.slow
def test_float32_fits_too(tmp_path: Path) -> None:
    binaries = run_on_fake_gpu("tests.helpers.gpu_launches:lora_kernels", "float32", cache=tmp_path)
    assert [binary for binary in binaries if binary.stack > SPILLS] == []
    assert max(binary.shared for binary in binaries) <= SHARED_MEMORY
