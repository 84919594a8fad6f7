"""Triton's interpreter, which stands in for a GPU in tests of kernels."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


def mend_interpreter() -> None:
    """Let tensors be bounds of loops, whichever NumPy is installed; comes before any kernel runs.

    Every scalar of the interpreter is an array of one element. Triton up to 3.6 makes a number
    of it by ``int``, which NumPy takes for arrays without dimensions only from 2.5 on.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or hasattr(patch, "__wrapped__"):
        return

    @functools.wraps(patch)
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
