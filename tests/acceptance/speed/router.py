"""What the router takes for itself, without a model: FakeShard behind it, 256 streams over HTTP.

In one process, and as a core with two fronts in processes of their own. ``python -m
tests.acceptance.speed.router`` runs these points alone, in about four minutes.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from tests.acceptance.harness import Point, Result, run_points
from tests.acceptance.serve import run_bench

MOST_FRONT_US = 60.0
MOST_CORE_US = 25.0
MOST_TURN_MS = 0.5
NUM_FRONTS = ("0", "2")
DIALECTS = ("generate_stream", "completions", "chat")


@cache
def _figures() -> dict[str, Any]:
    """Steps as fast as they can, and steps of 16 ms."""
    return run_bench("http_stream", "--http-workers", *NUM_FRONTS)


def _result(named: dict[str, dict[str, float]], most: float, unit: str) -> Result:
    """Each figure by its median; all must be small enough."""
    shown = [
        f"{name} {each['median']} ({each['least']} to {each['most']})"
        for name, each in named.items()
    ]
    ok = all(each["median"] <= most for each in named.values())
    return Result(ok, f"{unit}: {'; '.join(shown)}")


def point_front() -> Result:
    """All dialects that stream most."""
    named = {
        f"{dialect}, steps of {steps}, {number} fronts": of_steps[f"{number} fronts"][dialect][
            "front_us"
        ]
        for steps, of_steps in _figures().items()
        for number in NUM_FRONTS
        for dialect in DIALECTS
    }
    return _result(named, MOST_FRONT_US, "us a token")


def point_core() -> Result:
    """The engine loop alone, and the whole process in front of which there are fronts."""
    named = {f"alone, steps of {steps}": each["core_us"] for steps, each in _figures().items()}
    named |= {
        f"{dialect}, steps of {steps}, 2 fronts": of_steps["2 fronts"][dialect]["core_us"]
        for steps, of_steps in _figures().items()
        for dialect in DIALECTS
    }
    return _result(named, MOST_CORE_US, "us a token")


def point_turn() -> Result:
    """One step in flight; of the processor's time, which other programs hardly change."""
    figures = _figures().items()
    named = {f"steps of {steps}": each["turnaround_processor_ms"] for steps, each in figures}
    passed = [each["turnaround_ms"]["median"] for _, each in figures]
    result = _result(named, MOST_TURN_MS, "ms of the processor")
    return Result(result.ok, f"{result.figure}; passed: {passed} ms")


POINTS = [
    Point("6a", "a front takes at most 60 us of processor time for a streamed token", point_front),
    Point("6b", "the core takes at most 25 us for a token", point_core),
    Point("6c", "at 256 rows, reply in to next request out within 0.5 ms", point_turn),
]

if __name__ == "__main__":
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
