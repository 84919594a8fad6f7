"""How much torch's libraries keep of the kernels that they make for each shape on a CPU.

oneDNN, and what torch puts between it and itself, make a kernel for each number of rows and keep
the last 1,024 each: 0.7 MiB a kernel here. A ragged step has any number of tokens, so a shard
would grow by hundreds of MiB before that is reached. To make a kernel anew takes half a
millisecond; a step needs one for each shape of a linear.
"""

from __future__ import annotations

import os

# Several steps' worth of linears.
_NUM_KEPT = 64
_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_kernel_caches() -> None:
    """Keep few kernels; to be called before torch is imported, which reads this once.

    A user who sets these variables knows better.
    """
    for name in _VARIABLES:
        os.environ.setdefault(name, str(_NUM_KEPT))
