"""Graphs without a GPU: what a call computes is noted, operation by operation, and done again.

As with a CUDA graph, an operation is repeated with the tensors that it was given, where they lie,
and with the numbers that it was given, as they were: whatever the call looked at on the host is
frozen. Triton's kernels run in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction


class TracingRecorder:
    """Implements ``GraphRecorder``; counts what it is asked for."""

    def __init__(self, fault: Callable[[list[Callable[[], None]]], None] | None = None) -> None:
        """``fault`` may change what a graph repeats."""
        self.num_recorded = self.num_replayed = 0
        self._fault = fault

    def record(self, call: Callable[[], None]) -> Callable[[], None]:
        self.num_recorded += 1
        steps = recorded(call)
        if self._fault is not None:
            self._fault(steps)

        def replay() -> None:
            self.num_replayed += 1
            for step in steps:
                step()

        return replay


def recorded(call: Callable[[], None]) -> list[Callable[[], None]]:
    """Return what a call did, one function an operation."""
    mode = _Trace()
    run = InterpretedFunction.run

    def noted_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        def again() -> None:
            with _disable_current_modes():
                run(self, *args, grid=grid, warmup=warmup, **kwargs)

        mode.steps.append(again)
        again()

    InterpretedFunction.run = noted_run
    try:
        with mode:
            call()
    finally:
        InterpretedFunction.run = run
    return mode.steps


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            raise RuntimeError("the host waits for a number of the device, which no graph can")
        made = func(*args, **kwargs)
        given = {_place(each) for each in tree_leaves((args, kwargs)) if _is_tensor(each)}
        kept = [each for each in tree_leaves(made) if _is_tensor(each)]
        if all(_place(each) in given for each in kept) and not _writes(func):
            return made  # a view

        def again() -> None:
            new = [each for each in tree_leaves(func(*args, **kwargs)) if _is_tensor(each)]
            for old, value in zip(kept, new, strict=True):
                if _place(old) not in given:
                    old.copy_(value)

        self.steps.append(again)
        return made


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _writes(func: Any) -> bool:
    return any(each.alias_info and each.alias_info.is_write for each in func._schema.arguments)
