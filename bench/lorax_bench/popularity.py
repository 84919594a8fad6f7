"""Which adapter each request asks for: laws by formula, over adapters 0 to n - 1.

===========  ==================================================================
round-robin  request i asks for adapter i mod n
uniform      P(k) = 1/n
zipf         P(k) proportional to (k + 1) ** -alpha
power        floor(n * X) with P(X < x) = x ** alpha, S-LoRA's: uniform for 1, ever
             more for adapter 0 below it
===========  ==================================================================
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LAWS = ("round-robin", "uniform", "zipf", "power")


def probabilities(law: str, num_adapters: int, alpha: float = 1.0) -> npt.NDArray[np.float64]:
    """Return the share of requests of each adapter."""
    _check(law, num_adapters, alpha)
    numbers = np.arange(num_adapters, dtype=np.float64)
    if law == "zipf":
        weights = (numbers + 1) ** -alpha
        return np.asarray(weights / weights.sum())
    if law == "power":
        return np.diff((np.arange(num_adapters + 1) / num_adapters) ** alpha)
    return np.full(num_adapters, 1 / num_adapters)


def choose(
    law: str, num_adapters: int, num_requests: int, rng: np.random.Generator, alpha: float = 1.0
) -> list[int]:
    """Return the adapter of each request."""
    _check(law, num_adapters, alpha)
    if law == "round-robin":
        return [number % num_adapters for number in range(num_requests)]
    shares = probabilities(law, num_adapters, alpha)
    return [int(each) for each in rng.choice(num_adapters, size=num_requests, p=shares)]


def _check(law: str, num_adapters: int, alpha: float) -> None:
    if law not in LAWS:
        raise ValueError(f"there is no law {law!r}; there are {', '.join(LAWS)}")
    if num_adapters < 1:
        raise ValueError(f"a law needs at least 1 adapter, got {num_adapters}")
    if alpha <= 0:
        raise ValueError(f"`alpha` must be above 0, got {alpha}")
