"""Triton's interpreter, which stands in for a GPU in tests of kernels."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any


def mend_interpreter() -> None:
    """Mend what tests trip over; comes before any kernel runs."""
    if importlib.util.find_spec("triton") is not None:
        _mend_bounds()
        _mend_calls()


def _mend_bounds() -> None:
    """Let tensors be bounds of loops, whichever NumPy is installed.

    Every scalar of the interpreter is an array of one element. Triton up to 3.6 makes a number
    of it by ``int``, which NumPy takes for arrays without dimensions only from 2.5 on.
    """
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or hasattr(patch, "__wrapped__"):
        return

    @functools.wraps(patch)
    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor


def _mend_calls() -> None:
    """Let a kernel's call of a function cost no more than that.

    Triton patches its language for each of them, which takes longer than most functions do.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or hasattr(patch, "__wrapped__"):
        return

    @functools.wraps(patch)
    def patch_lang(fn: Any) -> Any:
        known = {id(value) for value in fn.__globals__.values()}
        seen = [each for each in (language, language.core) if id(each) in known]
        if any(language.core.is_builtin(each.load) for each in seen):
            return patch(fn)
        # It is done; whoever did it undoes it.
        scope = getattr(interpreter, "_LangPatchScope", None)
        return None if scope is None else scope()

    interpreter._patch_lang = patch_lang
