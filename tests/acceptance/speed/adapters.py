"""What adapters add to a step, beside their bytes over the bandwidth that the same run measures.

``python -m tests.acceptance.speed.adapters`` runs these points alone, in about three minutes.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from tests.acceptance.harness import Point, Result, run_points
from tests.acceptance.serve import run_bench

MOST_OF_FLOOR = 1.5
LEAST_OF_FEW = 0.95
# Of adapters in 16 bits, by how many are in a step.
LEAST_RETENTION = {8: 0.90, 64: 0.75}
NUM_KNOWN = 1000


@cache
def _figures() -> dict[str, Any]:
    """Steps with an adapter for each row, with and without turn and turn about."""
    return run_bench(
        "lora", "--cases", "8x8", "32x32", "64x64", "--many", str(NUM_KNOWN), "--rounds", "40",
        "--stored-dtype", "float32", "bfloat16",
    )  # fmt: skip


def _cases(dtype: str, adapters: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        case
        for case in _figures()["cases"]
        if case["dtype"] == dtype and case["adapters"] in adapters
    ]


def _added(dtype: str) -> Result:
    found = _cases(dtype, (8, 32))
    shown = [
        f"{case['adapters']}: {case['ratio']:.2f} ({case['added_ms']:.2f} ms, quarters "
        f"{case['added_low_ms']:.2f} to {case['added_high_ms']:.2f}, over {case['floor_ms']:.2f} "
        f"at {case['bandwidth']:.1f} GB/s)"
        for case in found
    ]
    return Result(all(case["ratio"] <= MOST_OF_FLOOR for case in found), "; ".join(shown))


def point_added() -> Result:
    """Adapters whose files are of float32."""
    return _added("float32")


def point_added_16_bits() -> Result:
    """Half the bytes: the floor is half as high."""
    return _added("bfloat16")


def point_retention() -> Result:
    """What the floor leaves, of every case."""
    found = [case for dtype in ("float32", "bfloat16") for case in _cases(dtype, (8, 32, 64))]
    shown = [
        f"{case['dtype']} {case['adapters']}: {case['retention']:.3f} of {case['asked']:.3f}"
        for case in found
    ]
    return Result(all(case["retention"] >= case["asked"] for case in found), "; ".join(shown))


def point_retention_16_bits() -> Result:
    """As asked for whatever the machine's bandwidth."""
    found = _cases("bfloat16", tuple(LEAST_RETENTION))
    shown = [f"{case['adapters']}: {case['retention']:.3f}" for case in found]
    ok = all(case["retention"] >= LEAST_RETENTION[case["adapters"]] for case in found)
    return Result(ok, "; ".join(shown))


def point_many() -> Result:
    """Eight of all slots, drawn anew for each step, beside the same eight."""
    ratio = _figures()["many"]
    return Result(ratio >= LEAST_OF_FEW, f"{ratio:.3f} of the speed with 8")


POINTS = [
    Point("2a", "8 and 32 adapters add at most 1.5x their bytes over bandwidth", point_added),
    Point("2b", "so do adapters that are kept in 16 bits", point_added_16_bits),
    Point("2c", "retention >= 0.95 step / (step + 1.5 bytes / bandwidth)", point_retention),
    Point("2d", "in 16 bits >= 0.90 with 8 and >= 0.75 with 64", point_retention_16_bits),
    Point("2e", "any 8 of 1,000 in slots: >= 0.95x of the same 8", point_many),
]

if __name__ == "__main__":
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
