"""Fair shares: a victim of floods, and a client with many adapters, over the virtual clock."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from tests.acceptance.harness import Point, Result
from tests.acceptance.scheduling.simulated import A10G, Outcome, simulate

from lorax_router.simulator.trace import Trace

_SERVER = replace(A10G, kv_tokens=8192)
_SECONDS, _LENGTH, _RANK = 400.0, 256, 8
_NUM_COLD = 300
Columns = tuple[npt.NDArray[np.float64], int, npt.NDArray[np.int64]]


def _trace(*parts: Columns) -> Trace:
    """Return a trace of (times, tenant, adapters), all requests of VTC's lengths."""
    times = np.concatenate([each[0] for each in parts])
    order = np.argsort(times, kind="stable")
    tenants = np.concatenate([np.full(len(each[0]), each[1], np.int64) for each in parts])[order]
    adapters = np.concatenate([each[2] for each in parts])[order]
    lengths = np.full(len(times), _LENGTH, np.int64)
    num = int(adapters.max())
    return Trace(
        name="flood", times=times[order], tenants=tenants, adapters=adapters, prompts=lengths,
        outputs=lengths, limits=lengths, priorities=np.zeros_like(lengths),
        tenant_names=("victim", "flood"), tenant_weights=(1.0, 1.0),
        adapter_names=("base", *(f"adapter-{i}" for i in range(1, num + 1))),
        adapter_ranks=(0, *[_RANK] * num),
    )  # fmt: skip


def _every(
    rate: float, tenant: int, first: int, num_adapters: int = 1, seconds: float = _SECONDS
) -> Columns:
    """Return evenly spaced requests for adapters in turns, as VTC's suites space them."""
    count = int(rate * seconds)
    phase = np.random.RandomState(1 + tenant).rand() / rate
    return phase + np.arange(count) / rate, tenant, first + np.arange(count) % num_adapters


def flood_trace(rate: float, flood: float, seconds: float) -> Trace:
    """Return a trace of tenant 0 with an adapter, and of tenant 1 with another if it floods."""
    floods = [_every(flood, 1, 2, seconds=seconds)] if flood else []
    return _trace(_every(rate, 0, 1, seconds=seconds), *floods)


def _victim_under(num_flooding: int) -> Result:
    """Ten times the victim's requests, for so many adapters; at two rates of the victim."""
    figures, is_ok = [], True
    for rate in (0.1, 0.2, 0.3):
        victim = _every(rate, 0, 1)
        solo = simulate(_trace(victim), "fair", _SERVER)
        trace = _trace(victim, _every(10 * rate, 1, 2, num_flooding))
        flooded = simulate(trace, "fair", _SERVER)
        fcfs = simulate(trace, "fcfs", _SERVER)
        wait = _p99(flooded, trace)
        bound = float(np.percentile(solo.waits, 99) + 3 * np.percentile(flooded.step_seconds, 99))
        is_ok = is_ok and wait <= bound
        figures.append(f"{rate}/s: {wait:.2f} s of {bound:.2f} (fcfs {_p99(fcfs, trace):.1f})")
    return Result(is_ok, "; ".join(figures))


def _p99(outcome: Outcome, trace: Trace) -> float:
    return float(np.percentile(outcome.waits[trace.tenants == 0], 99))


def point_requests() -> Result:
    """A victim's first tokens under ten times its requests."""
    return _victim_under(1)


def point_cold() -> Result:
    """The same under requests for more cold adapters than there are slots."""
    return _victim_under(_NUM_COLD)


def point_many_adapters() -> Result:
    """Two clients that ask for the same, one with fifty adapters: it gets no more."""
    trace = _trace(_every(1.5, 0, 1, 50), _every(1.5, 1, 51))
    outcome = simulate(trace, "fair", _SERVER)
    many, one = (outcome.figures["service"]["clients"][name] for name in ("victim", "flood"))
    ahead = max(a - b for a, b in zip(many, one, strict=True))
    return Result(
        ahead <= outcome.bound["held"],
        f"at most {ahead:,.0f} ahead of the client with one, bound {outcome.bound['held']:,.0f}",
    )


POINTS = [
    Point("1a", "fifty adapters get no more than one", point_many_adapters),
    Point("1r", "a victim's first token under ten times its requests", point_requests),
    Point("1c", "a victim's first token under a flood of cold adapters", point_cold),
]
