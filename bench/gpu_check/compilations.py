"""Which of the shard's kernels have been compiled in this process, and into how many variants."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from bench.gpu_check.report import Report


class CompiledSince:
    """Tells what is compiled after the warm-up: steps wait for it, so it should be nothing."""

    def __init__(self) -> None:
        """Begin; the warm-up is over."""
        self._before = variants()

    def note(self, report: Report) -> None:
        """Add a line about it."""
        since = variants() - self._before
        names = ", ".join(f"{name} {count}" for name, count in sorted(since.items()))
        report.note(
            f"kernel variants compiled before the first step: {self._before.total()}; "
            f"after it: {since.total()}" + (f" ({names})" if names else "")
        )


def variants() -> Counter[str]:
    """Return by the kernel's name how many variants of it there are; interpreted ones have none."""
    return Counter({name: count for name, kernel in _kernels() if (count := _count(kernel))})


def _kernels() -> Iterator[tuple[str, Any]]:
    try:
        from triton.runtime import JITFunction
    except ImportError:
        return
    modules = [module for name, module in sys.modules.items() if name.startswith("lorax_shard.")]
    found = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    for kernel in found.values():
        yield kernel.fn.__qualname__, kernel


def _count(kernel: Any) -> int:
    # By device: the variants, then what they are made with.
    caches = kernel.device_caches.values() if hasattr(kernel, "device_caches") else ()
    return sum(len(each[0]) for each in caches)
