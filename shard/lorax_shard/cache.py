"""The cache folder of a shard, and what its entries depend on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# What /proc/cpuinfo says of instruction set and model, on x86 and on Arm.
_CPU_LINES = ("flags", "Features", "model")


def default_cache_dir() -> Path:
    """Return ``$LORAX_CACHE``, or ``lorax-py`` in the user's cache folder."""
    if chosen := os.environ.get("LORAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorax-py"


def cpu_identity() -> list[str]:
    """Return lines that differ between CPUs for which code or measurements differ."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.is_file() else []
    return [platform.machine(), *sorted({line for line in lines if line.startswith(_CPU_LINES)})]
