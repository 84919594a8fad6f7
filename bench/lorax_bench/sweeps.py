"""Sweeps along the load, in the manner of GuideLLM: levels of concurrency, or rates.

Rates that nobody named lie between what the server does one request at a time and what it
does with all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lorax_bench.document import MeasuredRun
from lorax_bench.requests import Workload
from lorax_bench.session import Variant, Watch, run_once, unwatched
from lorax_bench.systems import AskedSystem

# Of each level: so many requests for each that runs at once, and at least so many.
_REQUESTS_FOR_EACH, _LEAST_REQUESTS = 3, 8

Build = Callable[[int, int | None, float | None], Workload]
"""A workload of a round, at a concurrency or a rate."""


def levels(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to ``most``."""
    found = [1]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def rates_between(slow: float, fast: float, steps: int) -> list[float]:
    """Return rates from just above ``slow`` to ``fast``, evenly."""
    if steps < 1:
        raise ValueError(f"a sweep needs at least 1 step, got {steps}")
    fast = max(slow, fast)
    return [slow + (fast - slow) * step / steps for step in range(1, steps + 1)]


def shortened(workload: Workload, concurrency: int) -> Workload:
    """Return the first requests of a workload: as many as show a level of concurrency."""
    most = max(_LEAST_REQUESTS, _REQUESTS_FOR_EACH * concurrency)
    return replace(workload, requests=workload.requests[:most])


def concurrency_variants(name: str, build: Build, chosen: Sequence[int]) -> list[Variant]:
    """Return a variant for each level of concurrency."""

    def at(level: int) -> Variant:
        return Variant(
            name=name, workload=lambda number: shortened(build(number, level, None), level)
        )

    return [at(level) for level in chosen]


def rate_variants(name: str, build: Build, chosen: Sequence[float]) -> list[Variant]:
    """Return a variant for each rate."""

    def at(rate: float) -> Variant:
        return Variant(name=name, workload=lambda number: build(number, None, rate), rate=rate)

    return [at(rate) for rate in chosen]


def find_rates(
    system: AskedSystem, build: Build, steps: int, watch: Watch = unwatched
) -> tuple[list[float], list[MeasuredRun]]:
    """Return rates between the slowest and the fastest way to send, and the two runs."""
    ends = [
        Variant(name="one at a time", workload=lambda number: shortened(build(number, 1, None), 1)),
        Variant(name="all at once", workload=lambda number: build(number, None, None)),
    ]
    # Rounds of numbers of their own: prompts that no later run has.
    runs = [run_once(system, variant, -1 - place, watch) for place, variant in enumerate(ends)]
    slow, fast = (run.figures.requests_per_s for run in runs)
    return rates_between(slow, fast, steps), runs
