"""Traffic for many adapters: skewed and drifting, or with bursts of single ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorax_router.simulator.trace import Floats, Ints, Trace, trace_of_clients

FLEET_WORKLOADS = ("drift", "bursts", "steady")
_RANK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetTraffic:
    """How much is asked for, of what.

    Adapter of popularity r gets a part of requests that goes with 1 / r^alpha. Prompts and outputs
    are log-normal, cut at both ends.
    """

    rate: float
    duration_s: float = 60.0
    num_adapters: int = 10_000
    alpha: float = 1.0
    prompt: tuple[float, float, int, int] = (150.0, 0.7, 16, 1024)
    output: tuple[float, float, int, int] = (40.0, 0.6, 4, 200)
    # Bursts: how long one is, how often one begins, and its part of all requests.
    burst_s: float = 8.0
    burst_every_s: float = 12.0
    burst_part: float = 0.06


def make_fleet_trace(name: str, traffic: FleetTraffic, seed: int) -> Trace:
    """Return a workload by its name, one of FLEET_WORKLOADS."""
    random = np.random.default_rng(seed)
    num = int(traffic.rate * traffic.duration_s)
    times = np.sort(random.uniform(0.0, traffic.duration_s, num))
    if name == "drift":
        adapters = _drifting(random, traffic, times)
    elif name == "steady":
        adapters = random.permutation(traffic.num_adapters)[_ranks(random, traffic, num)]
    elif name == "bursts":
        adapters = _bursting(random, traffic, times)
    else:
        known = ", ".join(FLEET_WORKLOADS)
        raise ValueError(f"there is no workload {name!r}; known are {known}")
    return trace_of_clients(
        name,
        times=times,
        clients=adapters,
        prompts=_lengths(random, num, *traffic.prompt),
        outputs=_lengths(random, num, *traffic.output),
        ranks=[_RANK] * traffic.num_adapters,
        kind="adapters",
    )


def _lengths(
    random: np.random.Generator, num: int, median: float, sigma: float, low: int, high: int
) -> Ints:
    drawn = random.lognormal(np.log(median), sigma, num)
    return np.clip(np.rint(drawn), low, high).astype(np.int64)


def _ranks(random: np.random.Generator, traffic: FleetTraffic, num: int) -> Ints:
    """Draw places in the order of popularity, 0 the most popular."""
    weights = 1.0 / np.arange(1, traffic.num_adapters + 1) ** traffic.alpha
    return random.choice(traffic.num_adapters, size=num, p=weights / weights.sum())


def _drifting(random: np.random.Generator, traffic: FleetTraffic, times: Floats) -> Ints:
    """In the middle half of the adapters, popular or not, change places with each other."""
    before = random.permutation(traffic.num_adapters)
    after = before.copy()
    places = random.choice(traffic.num_adapters, traffic.num_adapters // 2, replace=False)
    # The most popular is among them: else nothing may happen to what counts most.
    if 0 not in places:
        places[0] = 0
    after[places] = before[np.roll(places, 1)]
    ranks = _ranks(random, traffic, len(times))
    is_late = times >= traffic.duration_s / 2
    return np.where(is_late, after[ranks], before[ranks])


def _bursting(random: np.random.Generator, traffic: FleetTraffic, times: Floats) -> Ints:
    """Now and then one of the less popular half has a part of all requests."""
    adapters = random.permutation(traffic.num_adapters)
    chosen = adapters[_ranks(random, traffic, len(times))]
    start = traffic.burst_every_s / 2
    while start < traffic.duration_s:
        one = adapters[random.integers(traffic.num_adapters // 2, traffic.num_adapters)]
        in_burst = (times >= start) & (times < start + traffic.burst_s)
        is_of_it = in_burst & (random.random(len(times)) < traffic.burst_part)
        chosen[is_of_it] = one
        start += traffic.burst_every_s
    return chosen
