"""Classes: an urgent one under a flood of a worse one, over the virtual clock."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tests.acceptance.harness import Point, Result
from tests.acceptance.scheduling.simulated import A10G, simulate
from tests.acceptance.scheduling.victims import flood_trace

_SERVER = replace(A10G, kv_tokens=8192)
# Some hundred requests: of fewer, the 99th percentile is the latest but one.
_SECONDS = 2000.0


def point_urgent() -> Result:
    """First tokens of the urgent class, beside what they take on an idle server."""
    alone, flooded = (flood_trace(0.2, flood, _SECONDS) for flood in (0.0, 2.0))
    trace = replace(flooded, priorities=flooded.tenants)
    idle = simulate(alone, "priority", _SERVER)
    run = simulate(trace, "priority", _SERVER)
    wait = float(np.percentile(run.waits[trace.priorities == 0], 99))
    bound = float(np.percentile(idle.waits, 99) + 2 * np.percentile(run.step_seconds, 99))
    return Result(wait <= bound, f"p99 {wait:.2f} s of {bound:.2f}")


POINTS = [Point("6u", "an urgent class under ten times as many requests", point_urgent)]
