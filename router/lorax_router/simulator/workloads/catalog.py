"""Workloads by name: ``family:suite,option=value,...``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lorax_router.simulator.trace import Trace
from lorax_router.simulator.workloads.punica import punica
from lorax_router.simulator.workloads.recorded import recorded
from lorax_router.simulator.workloads.sglang import sglang
from lorax_router.simulator.workloads.slora import slora
from lorax_router.simulator.workloads.vtc import vtc

FAMILIES: dict[str, Callable[..., Trace]] = {
    "slora": slora,
    "vtc": vtc,
    "punica": punica,
    "sglang": sglang,
    "file": recorded,
}


def make_workload(text: str, seed: int | None = None) -> Trace:
    """Return the workload that a text names; ValueError in words if there is none."""
    family, _, rest = text.partition(":")
    if family not in FAMILIES:
        raise ValueError(f"no workload is called {family}; there are {', '.join(FAMILIES)}")
    make = FAMILIES[family]
    parts = [part for part in rest.split(",") if part]
    suite = parts.pop(0) if parts and "=" not in parts[0] else None
    known = inspect.signature(make).parameters
    options: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            names = ", ".join(list(known)[1:])
            raise ValueError(f"{family} has no option {part}; its options are {names}")
        options[name] = _convert(name, value, known[name].default)
    if seed is not None and "seed" in known:
        options.setdefault("seed", seed)
    return make(*([suite] if suite is not None else []), **options)


def _convert(name: str, value: str, default: Any) -> Any:
    """Read a value as what the option's default is; a pair is written like 8-512."""
    try:
        if isinstance(default, tuple):
            low, high = value.split("-")
            return int(low), int(high)
        return type(default)(value)
    except ValueError:
        example = "8-512" if isinstance(default, tuple) else default
        raise ValueError(f"{name} is given as in {name}={example}, not as {value}") from None
