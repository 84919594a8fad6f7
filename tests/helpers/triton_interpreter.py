"""Whether Triton's interpreter works here, for tests of kernels on machines without a GPU."""

from __future__ import annotations

import functools

import numpy as np
import torch


@functools.cache
def interpreter_fault() -> str | None:
    """Interpret a loop over a loaded bound: up to 3.6 that fails beside NumPy 2.4."""
    import triton
    import triton.language as tl

    @triton.jit
    def count(bound, out):
        total = 0
        for _ in range(tl.load(bound)):
            total += 1
        tl.store(out, total)

    out = torch.zeros(1, dtype=torch.int32)
    try:
        count[(1,)](torch.tensor([3], dtype=torch.int32), out)
    except Exception as error:
        return f"triton {triton.__version__}, numpy {np.__version__}: {error}"
    assert out.item() == 3
    return None
