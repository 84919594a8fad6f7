"""The kernels compile for GPUs: the interpreter runs Python that the compiler refuses."""

import os
import subprocess
import sys

import pytest

# Compilation needs no GPU, but a process in which nothing is interpreted.
_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lorax_shard.attention import triton_kernels

TYPES = {"num_kv_heads": "i32", "table_stride": "i32", "scale": "fp32", "cap": "fp32"}
TENSORS = dict.fromkeys(["query", "key", "value", "keys", "values", "output"], "*fp16")
TENSORS |= dict.fromkeys(["sinks", "partial", "stats"], "*fp32") | {"slots": "*i64"}
TENSORS |= dict.fromkeys(
    ["first_tokens", "query_lens", "context_lens", "tables", "tiles"], "*i32"
)
SIZES = {
    "group": 3, "heads": 3, "key_dim": 24, "value_dim": 16, "block_size": 16, "window": 40,
    "chunk": 70, "has_softcap": True, "has_sinks": True, "is_split": True, "block_m": 16,
    "block_n": 16, "block_d": 32, "block_e": 16, "block_s": 4, "block_g": 4,
}
for kernel in map(triton_kernels.__dict__.get, ("store", "prompt", "decode", "combine")):
    names = kernel.arg_names
    constants = {(names.index(name),): size for name, size in SIZES.items() if name in names}
    signature = {
        name: "constexpr" if name in SIZES else (TENSORS | TYPES).get(name, "i32")
        for name in names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 80, 32))
    print("compiled", kernel.__name__)
"""


def test_every_kernel_compiles(tmp_path: os.PathLike[str]) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        word for name in ("store", "prompt", "decode", "combine") for word in ("compiled", name)
    ]
