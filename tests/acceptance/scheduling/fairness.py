"""Fair shares: VTC's suites, over the virtual clock."""

from __future__ import annotations

from tests.acceptance.harness import Point, Result
from tests.acceptance.scheduling.simulated import named

from lorax_router.simulator.workloads.vtc import SUITES

# With so many tokens arrival order breaks the bound in each suite.
_POOL = 8192
# Of the gap in order of arrival.
_MAX_GAP = 0.6


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


POINTS = [
    Point("1s", "service of waiting clients stays together in VTC's suites", point_suites),
]
