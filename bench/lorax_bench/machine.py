"""Which machine, versions and commit a result is of."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

_PACKAGES = (
    "lorax-py", "torch", "transformers", "peft", "tokenizers", "grpcio", "uvicorn", "aiohttp", "numpy",
)  # fmt: skip
# What decides how fast a CPU multiplies.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "asimddp")
# What else computed when this program began, before it computed itself.
_LOAD_AT_START = os.getloadavg()[0]


def machine() -> dict[str, str]:
    """Return what this machine is, and how busy it was before."""
    facts = _cpu_facts()
    found = {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "features": " ".join(each for each in _FEATURES if each in facts.get("flags", "").split()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
        "load average before": f"{_LOAD_AT_START:.1f}",
    }
    if gpus := _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"):
        found["gpus"] = "; ".join(gpus.splitlines())
    return found


def versions() -> dict[str, str]:
    """Return the versions of what runs here; a server elsewhere may have others."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the checkout's commit, with a mark if something in it was changed; None: no checkout."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return None
    is_changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return found + (" and changes" if is_changed else "")


def _cpu_facts() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _output(*command: str) -> str:
    """Return what a program prints; nothing if there is none or it fails."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
