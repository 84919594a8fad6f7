"""Four routings in front of 100 simulated replicas, on both workloads and two seeds."""

from __future__ import annotations

from tests.acceptance.harness import Result

from lorax_ingress.simulator.comparison import FleetFigures, FleetSetting, as_rows, compare
from lorax_ingress.simulator.routings import ROUTINGS

SETTING = FleetSetting(duration_s=30.0)
WORKLOADS, SEEDS = ("drift", "bursts"), (1, 2)
# Beside the loads of plain consistent hashing.
MOST_LOADS = 1.2


def point_routings() -> Result:
    """Ours has the best p99 of first tokens, and few more loads than consistent hashing."""
    parts, is_good = [], True
    for workload in WORKLOADS:
        for seed in SEEDS:
            figures = list(compare(SETTING, workload, ROUTINGS, seed))
            print("\n".join(f"    {line}" for line in as_rows(figures)), flush=True)
            part, is_kept = verdict(figures)
            parts.append(f"{workload} {seed}: {part}")
            is_good = is_good and is_kept
    return Result(is_good, "; ".join(parts))


def verdict(figures: list[FleetFigures]) -> tuple[str, bool]:
    """Return what one workload shows in words, and whether it is enough."""
    by_name = {each.routing: each for each in figures}
    ours, hashing = by_name.pop("affine"), by_name["consistent"]
    best = min(by_name.values(), key=lambda each: each.p99_s)
    ratio = ours.loads / hashing.loads
    words = (
        f"p99 {ours.p99_s:.2f} s (next {best.p99_s:.2f}, {best.routing}), "
        f"{ours.loads_per_adapter:.2f} loads per adapter, {ratio:.2f} of hashing's"
    )
    return words, ours.p99_s < best.p99_s and ratio <= MOST_LOADS
