"""Which machine and which versions a table is of."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PACKAGES = ("torch", "triton", "transformers", "peft", "flash-attn", "grpcio", "protobuf", "numpy")


def describe(*, small: bool) -> dict[str, str]:
    """Return device, driver, commit and versions; what is unknown says so."""
    import torch

    has_gpu = torch.cuda.is_available() and not small
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return {
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "driver": driver() if has_gpu else "none",
        "CUDA": str(torch.version.cuda) if has_gpu else "none",
        "host": cpu,
        "system": platform.platform(),
        "Python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def driver() -> str:
    """Return the version of the GPU's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query) or "unknown"


def commit() -> str:
    """Return the checkout's commit, with a mark if something in it was changed."""
    found = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if not found:
        # A copy without history; whoever made it may say.
        return os.environ.get("GPU_CHECK_COMMIT", "unknown")
    is_changed = _output(["git", "status", "--porcelain", "--untracked-files=no"])
    return found + (" and changes" if is_changed else "")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
