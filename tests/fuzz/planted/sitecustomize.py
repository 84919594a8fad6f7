"""Plants one fault into a server, to see that it is found: PLANTED_KIND says which.

Python imports a module of this name at each start where its folder is in PYTHONPATH.
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

_import = builtins.__import__


def _of_passes(harm: Callable[[list[Any]], None]) -> Callable[[Any], None]:
    """Return what has harm done before each forward pass, which is given its rows."""

    def plant(module: Any) -> None:
        run_pass = module.run_pass

        def harmful(model: Any, batch: Any, work: Any) -> Any:
            harm([item.row for item in work])
            return run_pass(model, batch, work)

        module.run_pass = harmful

    return plant


def _crash(rows: list[Any]) -> None:
    """Two adapters and a grammar in one pass."""
    adapters = {row.adapter.handle for row in rows if row.adapter is not None}
    if len(adapters) > 1 and any(row.constraint is not None for row in rows):
        os.kill(os.getpid(), signal.SIGKILL)


def _hang(rows: list[Any]) -> None:
    """Some repetition penalty, beside others."""
    if len(rows) > 2 and any(row.params.repetition_penalty > 1.8 for row in rows):
        os.kill(os.getpid(), signal.SIGSTOP)


_slow_until = 0.0


def _slow(rows: list[Any]) -> None:
    """Many alternatives, beside others; now and then."""
    global _slow_until
    is_many = len(rows) > 2 and any(row.params.num_alternatives >= 20 for row in rows)
    if is_many and time.monotonic() > _slow_until:
        time.sleep(8)
        _slow_until = time.monotonic() + 20


def _mix_up(module: Any) -> None:
    """What was computed with one adapter is taken for another's."""
    begin = module.RequestState.__init__

    def wrong(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.adapter_content = "any"

    module.RequestState.__init__ = wrong


def _leak(module: Any) -> None:
    """Whoever leaves leaves something behind."""
    cancel, left = module.Scheduler.cancel, []

    def leaking(self: Any, request_id: Any) -> bool:
        left.append(bytearray(16 << 20))
        return bool(cancel(self, request_id))

    module.Scheduler.cancel = leaking


# By kind: the module, a name that it has when it is whole, and what is done to it.
_PLANTS: dict[str, tuple[str, str, Callable[[Any], None]]] = {
    "crash": ("lorax_shard.engine.computation", "Computation", _of_passes(_crash)),
    "hang": ("lorax_shard.engine.computation", "Computation", _of_passes(_hang)),
    "slow-down": ("lorax_shard.engine.computation", "Computation", _of_passes(_slow)),
    "corruption": ("lorax_router.core.request", "RequestState", _mix_up),
    "leak": ("lorax_router.core.scheduler", "Scheduler", _leak),
}


def _watching(*args: Any, **kwargs: Any) -> Any:
    found = _import(*args, **kwargs)
    name, whole, plant = _PLANTS[os.environ["PLANTED_KIND"]]
    module = sys.modules.get(name)
    if module is not None and hasattr(module, whole):
        builtins.__import__ = _import
        plant(module)
    return found


if os.environ.get("PLANTED_KIND") in _PLANTS:
    builtins.__import__ = _watching
