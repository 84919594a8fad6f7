"""Fair shares: VTC's suites, over the virtual clock."""

from __future__ import annotations

from tests.acceptance.harness import Point, Result
from tests.acceptance.scheduling.simulated import named

from lorax_router.simulator.workloads.vtc import SUITES

# With so many tokens arrival order breaks the bound in each suite.
_POOL = 8192
# Of the gap in order of arrival, and of its throughput.
_MAX_GAP, _LEAST_THROUGHPUT = 0.6, 0.97


def point_suites() -> Result:
    """The gap of clients that wait, against the bound and against order of arrival."""
    short, most, least_fcfs = [], 0.0, float("inf")
    for suite in SUITES:
        fcfs, fair = (named(f"vtc:{suite}", policy, _POOL) for policy in ("fcfs", "fair"))
        bound = fair.bound["held"]
        before, gap = fcfs.figures["service_gap"], fair.figures["service_gap"]
        print(f"    {suite}: gap {gap:,.0f}, fcfs {before:,.0f}, bound {bound:,.0f}", flush=True)
        most, least_fcfs = max(most, gap / before), min(least_fcfs, before / bound)
        if not (before > bound >= gap and gap <= _MAX_GAP * before):
            short.append(suite)
    figure = (
        f"{len(SUITES)} suites: gap at most {most:.3f} of fcfs', "
        f"whose own is at least {least_fcfs:.2f} of the bound"
    )
    return Result(not short, f"{figure}; short: {', '.join(short)}" if short else figure)


def point_throughput() -> Result:
    """What sharing fairly costs."""
    ratios = {
        suite: named(f"vtc:{suite}", "fair", _POOL).figures["tokens_per_s"]
        / named(f"vtc:{suite}", "fcfs", _POOL).figures["tokens_per_s"]
        for suite in SUITES
    }
    least = min(ratios, key=ratios.__getitem__)
    return Result(
        ratios[least] >= _LEAST_THROUGHPUT, f"at least {ratios[least]:.3f} of fcfs' ({least})"
    )


POINTS = [
    Point("1s", "service of waiting clients stays together in VTC's suites", point_suites),
    Point("1t", "fair shares cost no throughput in these", point_throughput),
]
