"""How many random examples a test tries: few each time, many in acceptance."""

from __future__ import annotations

import os

_FACTOR = int(os.environ.get("LORAX_EXAMPLES", "1"))


def examples(number: int) -> int:
    """Return how many are tried: so many, or ``LORAX_EXAMPLES`` times as many."""
    return number * _FACTOR
