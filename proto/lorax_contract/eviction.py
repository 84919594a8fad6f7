"""What keeping something in a bounded place is worth: one rule for disk, memory and device.

It is GreedyDual-Size-Frequency: whoever keeps the place remembers the worth of what it let
go last as its ``floor``, and lets go what is worth least. What was wanted before the floor
rose is worth less than its equals that were wanted since, so the unused grows old without
a clock.
"""

from __future__ import annotations


def worth(floor: float, uses: float, cost_s: float, nbytes: int) -> float:
    """Return what something is worth that is wanted now, for ``uses`` times in all.

    Args:
        floor: the highest worth that was let go so far.
        uses: how often it was wanted, this time included.
        cost_s: seconds that having it again would take.
        nbytes: the bytes that it takes.
    """
    return floor + uses * cost_s / max(nbytes, 1)
