from pathlib import Path

import pytest
from tests.helpers.triton_compile import compile_kernels

pytest.importorskip("triton")

TYPES = {
    **dict.fromkeys(["query", "key", "value", "keys", "values", "output"], "*fp16"),
    **dict.fromkeys(["sinks", "partial", "stats"], "*fp32"),
    **dict.fromkeys(["first_tokens", "query_lens", "context_lens", "tables", "tiles"], "*i32"),
    **dict.fromkeys(["scale", "cap"], "fp32"),
    "slots": "*i64",
}
# Every branch that a constant opens is open.
CONSTANTS = {
    "group": 3, "heads": 3, "key_dim": 24, "value_dim": 16, "block_size": 16,
    "is_local": True, "has_softcap": True, "has_sinks": True, "is_split": True, "block_m": 16,
    "block_n": 16, "block_d": 32, "block_e": 16, "block_s": 4, "block_g": 4,
}  # fmt: skip
KERNELS = ["store", "prompt", "decode", "combine"]


@pytest.mark.parametrize(("cache", "capability"), [("*fp16", 80), ("*fp8e4nv", 90)])
def test_every_attention_kernel_compiles_for_a_gpu(
    cache: str, capability: int, tmp_path: Path
) -> None:
    module = "lorax_shard.attention.triton.kernels"
    types = {**TYPES, "keys": cache, "values": cache}
    compiled = compile_kernels(module, KERNELS, types, CONSTANTS, tmp_path, capability)
    assert compiled == KERNELS
