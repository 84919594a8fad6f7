"""The attention kernels as a GPU would get them."""

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
