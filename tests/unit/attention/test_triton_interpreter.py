"""The interpreter that tests of kernels run in works beside every NumPy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers.triton_interpreter import mend_interpreter

triton = pytest.importorskip("triton")
tl = triton.language
interpreter = pytest.importorskip("triton.runtime.interpreter")


def test_a_loaded_number_bounds_a_loop_where_arrays_are_no_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NumPy from 2.5 on makes no number of an array with a dimension, as Triton 3.6 asks of it."""
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        def refuse(self: Any) -> int:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

        original(tensor, scope)
        scope.set_attr(tensor, "__index__", refuse)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
    mend_interpreter()

    @triton.jit
    def count(bound, out):
        total = 0
        for _ in range(tl.load(bound)):
            total += 1
        tl.store(out, total)

    if not isinstance(count, interpreter.InterpretedFunction):
        pytest.skip("kernels are compiled here")
    out = torch.zeros(1, dtype=torch.int32)
    count[(1,)](torch.tensor([3], dtype=torch.int32), out)
    assert out.item() == 3
