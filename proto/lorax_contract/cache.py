"""Where prepared models, fetched adapters, compiled kernels and measurements are kept."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """Return ``$LORAX_CACHE``, or ``lorax-py`` in the user's cache folder."""
    if chosen := os.environ.get("LORAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorax-py"
