"""The suites of VTC's evaluation: few clients, each with a rate of its own.

Arrivals are evenly spaced with a random phase per client, where a suite says nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lorax_router.simulator.trace import ClientKind, Floats, Trace, trace_of_clients
from lorax_router.simulator.workloads.recorded import recorded

_LENGTH = 256
_RANK = 8
# Suites in which a client goes on and off change once a minute.
_ON_OFF_S = 60.0

# Requests of each client in the trace that the paper's evaluation ships.
_REAL_COUNTS = (
    296, 262, 199, 120, 67, 66, 56, 46, 44, 43, 40, 36, 31, 26, 25, 23, 22, 22, 19, 19, 12, 11, 7,
    3, 2, 2, 1,
)  # fmt: skip
_REAL_DURATION_S = 600.0
_REAL_CV = 1.10
# Quantiles of its lengths.
_REAL_PROMPTS = ((0.0, 1), (0.1, 5), (0.5, 40), (0.9, 432), (0.99, 929), (1.0, 1021))
_REAL_OUTPUTS = ((0.0, 1), (0.5, 211), (0.9, 513), (0.99, 785), (1.0, 977))


class _Arrivals(NamedTuple):
    """One client's requests."""

    times: Floats
    prompt: int
    output: int


def _even(rng: np.random.RandomState, rate: float, duration: float, start: float = 0.0) -> Floats:
    """Return evenly spaced arrivals with a random phase."""
    phase = rng.rand() / rate
    return np.asarray(start + phase + np.arange(1, int(rate * duration) + 1) / rate)


def _when_on(times: Floats) -> Floats:
    """Leave out every other minute."""
    is_on = (times // _ON_OFF_S).astype(np.int64) % 2 == 0
    return np.asarray(times[is_on])


def _even_clients(rates: Sequence[float], minutes: float) -> Callable[..., list[_Arrivals]]:
    def make(rng: np.random.RandomState) -> list[_Arrivals]:
        return [_Arrivals(_even(rng, rate, 60 * minutes), _LENGTH, _LENGTH) for rate in rates]

    return make


def _on_off(rates: Sequence[float]) -> Callable[..., list[_Arrivals]]:
    def make(rng: np.random.RandomState) -> list[_Arrivals]:
        first, *others = _even_clients(rates, 10)(rng)
        return [first._replace(times=_when_on(first.times)), *others]

    return make


def _increase(_rng: np.random.RandomState) -> list[_Arrivals]:
    """Client 0 at a rate of 0.5; that of client 1 grows from 0.2 to 2."""
    duration, start, end = 600.0, 0.2, 2.0
    times = [0.0]
    for _ in range(int(0.5 * (start + end) * duration)):
        times.append(times[-1] + 1 / (start + (end - start) * times[-1] / duration))
    steady = np.arange(1, int(0.5 * duration) + 1) / 0.5
    return [
        _Arrivals(steady, _LENGTH, _LENGTH),
        _Arrivals(np.array(times[1:]), _LENGTH, _LENGTH),
    ]


def _poisson(lengths: Sequence[tuple[int, int]]) -> Callable[..., list[_Arrivals]]:
    """Return one Poisson process of rate 9.5, of which client 0 has 8 parts and client 1 1.5."""

    def make(rng: np.random.RandomState) -> list[_Arrivals]:
        rate, share, total = 9.5, 8 / 9.5, int(9.5 * 600)
        clients = (rng.rand(total) > share).astype(np.int64)
        times = np.cumsum(rng.gamma(1.0, 1 / rate, total))
        return [_Arrivals(times[clients == i], *each) for i, each in enumerate(lengths)]

    return make


def _dist_shift(rng: np.random.RandomState) -> list[_Arrivals]:
    """Thirds of five minutes: on and off, equal, proportional."""
    third = 300.0
    parts: list[list[Floats]] = [[], []]
    for phase, rates in enumerate(((0.5, 2.0), (1.0, 1.0), (0.5, 1.5))):
        for client, rate in enumerate(rates):
            times = _even(rng, rate, third, start=phase * third)
            parts[client].append(_when_on(times) if phase == client == 0 else times)
    return [_Arrivals(np.concatenate(each), _LENGTH, _LENGTH) for each in parts]


SUITES: dict[str, Callable[[np.random.RandomState], list[_Arrivals]]] = {
    "overload": _even_clients((1.5, 3.0), 6),
    "overload-multi": _even_clients((0.4,) * 3 + (0.6,) * 5, 6),
    "overload-weighted": _even_clients((0.8, 0.8, 1.2, 1.6), 6),
    "proportional": _even_clients((0.25, 0.5, 1.5), 10),
    "increase": _increase,
    "on_off_less": _on_off((0.5, 2.0)),
    "on_off_overload": _on_off((2.0, 3.0)),
    "poisson_short_long": _poisson(((64, 64), (256, 256))),
    "short_long_2": _poisson(((512, 32), (32, 512))),
    "dist_shift": _dist_shift,
}
# Shares in the suite that has them.
WEIGHTS = {"overload-weighted": (1.0, 2.0, 3.0, 4.0)}


def vtc(
    suite: str = "overload",
    *,
    seed: int = 42,
    minutes: float = 0.0,
    path: str = "",
    clients: ClientKind = "tenants",
) -> Trace:
    """``vtc:overload``, or another suite; ``minutes`` cuts it short.

    ``vtc:real,path=FILE`` reads the shipped trace from a CSV or JSON file; without one the
    requests are drawn from its published statistics.
    """
    rng = np.random.RandomState(seed)
    if suite == "real":
        return recorded(path, clients=clients) if path else _real(rng, clients)
    if suite not in SUITES:
        raise ValueError(f"VTC has the suites {', '.join([*SUITES, 'real'])}; not {suite}")
    arrivals = SUITES[suite](rng)
    end = 60 * minutes if minutes else np.inf
    arrivals = [each._replace(times=each.times[each.times < end]) for each in arrivals]
    sizes = [len(each.times) for each in arrivals]
    return trace_of_clients(
        f"vtc:{suite}",
        times=np.concatenate([each.times for each in arrivals]),
        clients=np.repeat(np.arange(len(arrivals)), sizes),
        prompts=np.repeat([each.prompt for each in arrivals], sizes),
        outputs=np.repeat([each.output for each in arrivals], sizes),
        ranks=[_RANK] * len(arrivals),
        weights=WEIGHTS.get(suite),
        kind=clients,
    )


def _real(rng: np.random.RandomState, clients: ClientKind) -> Trace:
    """Draw requests from the statistics of the shipped trace.

    Lengths by their quantiles, between them linear (of prompts: in the logarithm).
    """
    total = sum(_REAL_COUNTS)
    mean = _REAL_DURATION_S / total
    column = rng.permutation(np.repeat(np.arange(len(_REAL_COUNTS)), _REAL_COUNTS))
    at, length = zip(*_REAL_PROMPTS)
    prompts = np.exp(np.interp(rng.rand(total), at, np.log(length))).astype(np.int64)
    at, length = zip(*_REAL_OUTPUTS)
    outputs = np.interp(rng.rand(total), at, length).astype(np.int64)
    times = np.cumsum(rng.gamma(1 / _REAL_CV**2, _REAL_CV**2 * mean, total))
    return trace_of_clients(
        "vtc:real",
        times=times,
        clients=column,
        prompts=prompts,
        outputs=outputs,
        ranks=[_RANK] * len(_REAL_COUNTS),
        kind=clients,
    )
