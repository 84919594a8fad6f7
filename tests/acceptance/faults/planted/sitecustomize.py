"""Plants a fault into shards: a forward pass with a marked prompt ends as an environment variable says.

Python imports a module of this name at each start where its folder is in PYTHONPATH.
"""

from __future__ import annotations

import builtins
import os
import signal
import sys
from typing import Any

_MARK = [int(each) for each in os.environ.get("PLANTED_IDS", "").split(",") if each]
_KIND = os.environ.get("PLANTED_KIND", "")
_MODULE = "lorax_shard.engine.computation"
_import = builtins.__import__


def _is_marked(ids: list[int]) -> bool:
    num = len(_MARK)
    return any(ids[start : start + num] == _MARK for start in range(len(ids) - num + 1))


def _harm() -> None:
    if _KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if _KIND == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise RuntimeError("a planted fault")


def _plant(module: Any) -> None:
    run_pass = module.run_pass

    def harmful(model: Any, batch: Any, work: Any) -> Any:
        if any(_is_marked(item.row.prompt_ids.tolist()) for item in work):
            _harm()
        return run_pass(model, batch, work)

    module.run_pass = harmful


def _watching(*args: Any, **kwargs: Any) -> Any:
    found = _import(*args, **kwargs)
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "Computation"):
        builtins.__import__ = _import
        _plant(module)
    return found


if _MARK and _KIND:
    builtins.__import__ = _watching
