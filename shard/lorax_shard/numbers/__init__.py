"""The types of numbers that kernels read: ``elements.h`` widens them, ``dots.h`` multiplies them."""

from __future__ import annotations

import torch

# How tables and calls number the types.
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
