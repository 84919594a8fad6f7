"""What adapters on experts add to a step, and their kernels as a GPU would get them."""

from __future__ import annotations

from tests.acceptance.harness import Result
from tests.acceptance.serve import run_bench
from tests.acceptance.suites import run_suite

MOST_OF_FLOOR = 2.0


def point_added() -> Result:
    """By the bytes of the routed experts' factors over the bandwidth of the same run."""
    parts, is_ok = [], True
    for dtype in ("float32", "bfloat16"):
        for case in run_bench("experts", "--stored-dtype", dtype, "--rounds", "40")["cases"]:
            is_ok = is_ok and case["ratio"] <= MOST_OF_FLOOR
            parts.append(
                f"{dtype} {case['rows']} rows of {case['adapters']}: {case['ratio']:.2f} "
                f"({case['added_ms']:.2f} ms of a step of {case['step_ms']:.0f} over "
                f"{case['floor_ms']:.2f} at {case['bandwidth']:.1f} GB/s)"
            )
            print(f"    {parts[-1]}", flush=True)
    return Result(is_ok, "; ".join(parts))


def point_kernels() -> Result:
    """Experts are slots to the kernels of all adapters: these are compiled, in two types."""
    run = run_suite("tests/unit/lora/test_triton_compiles.py")
    return Result(run.is_whole, f"{run.counts['passed']} passed")
