"""What entries of the cache folder depend on."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# What /proc/cpuinfo says of instruction set and model, on x86 and on Arm.
_CPU_LINES = ("flags", "Features", "model")


def cpu_identity() -> list[str]:
    """Return lines that differ between CPUs for which code or measurements differ."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.is_file() else []
    return [platform.machine(), *sorted({line for line in lines if line.startswith(_CPU_LINES)})]
