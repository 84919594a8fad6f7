from pathlib import Path

import pytest
from tests.helpers.triton_compile import compile_kernels

pytest.importorskip("triton")

TYPES = {
    **dict.fromkeys(["x", "y"], "*fp16"),
    **dict.fromkeys(["slot_of_row", "tiles", "rows", "table", "columns"], "*i64"),
    "h": "*fp32",
}
CONSTANTS = {
    "block_t": 16, "block_m": 16, "block_r": 16, "block_k": 64, "block_n": 128, "unit": 8,
    "num_parts": 2, "widen": False,
}  # fmt: skip
KERNELS = ["gather_rows", "shrink", "expand"]


def test_every_lora_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    module = "lorax_shard.lora.triton.kernels"
    assert compile_kernels(module, KERNELS, TYPES, CONSTANTS, tmp_path) == KERNELS
