"""When requests of an open loop are sent: times from the start, in seconds."""

from __future__ import annotations

import numpy as np


def gamma_arrivals(rate: float, cv: float, num: int, rng: np.random.Generator) -> list[float]:
    """Return arrivals of which ``rate`` come in a second, with intervals of a Gamma law.

    ``cv`` is the intervals' standard deviation over their mean: 1 is a Poisson process, above
    it requests come in bursts, below it more evenly; at 0 they come like a clock's ticks.
    """
    if rate <= 0:
        raise ValueError(f"`rate` must be above 0, got {rate}")
    if cv < 0:
        raise ValueError(f"`cv` must not be negative, got {cv}")
    if cv == 0:
        return [number / rate for number in range(num)]
    intervals = rng.gamma(1 / cv**2, cv**2 / rate, num)
    return [float(each) for each in np.cumsum(intervals)]


def poisson_arrivals(rate: float, num: int, rng: np.random.Generator) -> list[float]:
    """Return arrivals of a Poisson process."""
    return gamma_arrivals(rate, 1.0, num, rng)
