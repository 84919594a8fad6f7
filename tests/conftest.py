"""Settings that must stand before anything is imported."""

from __future__ import annotations

import os
import shutil

# Triton decides at import whether its kernels are compiled for a GPU or interpreted.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
