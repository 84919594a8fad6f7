"""The cost of planning: 256 requests run, 5,000 wait, 500 of 1,000 adapters wait for a slot.

``python -m tests.acceptance.scheduling.planning`` runs these points alone.
"""

from __future__ import annotations

import sys

from tests.acceptance.harness import Point, Result, run_points
from tests.acceptance.serve import run_bench

MOST_PLAN_MS = 1.0


def point_plan() -> Result:
    """Each policy, each shape of batches, each way to fill steps."""
    figures = run_bench("planning")
    medians = {name: each["plan_ms_p50"] for name, each in figures.items()}
    slowest = max(medians, key=medians.__getitem__)
    short = [name for name, median in medians.items() if median > MOST_PLAN_MS]
    figure = f"{len(medians)} loads, the slowest ({slowest}) {medians[slowest]} ms"
    return Result(not short, f"{figure}; above {MOST_PLAN_MS} ms: {short}" if short else figure)


POINTS = [
    Point("9", "a plan takes at most 1 ms with 256 running and 5,000 waiting", point_plan),
]

if __name__ == "__main__":
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
