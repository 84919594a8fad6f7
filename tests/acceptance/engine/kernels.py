"""Kernels for GPUs, on a machine without one: compiled before requests come, and how."""

from __future__ import annotations

from tests.acceptance.harness import Point, Result
from tests.acceptance.serve import run_tests


def point_warm_up() -> Result:
    """Nothing is compiled after the warm-up, whose largest step is the largest there is."""
    return run_tests(
        "tests/unit/model/test_compiles_at_warm_up.py", "tests/integration/test_warm_up.py",
        "tests/unit/engine/test_largest_step.py", "tests/unit/engine/test_memory.py",
    )  # fmt: skip


def point_compiles() -> Result:
    """Each kernel as it is for sm_90: registers, spills, shared memory."""
    return run_tests(
        "tests/unit/attention/test_triton_compiles.py", "tests/unit/lora/test_triton_compiles.py",
        "tests/unit/sampling/test_triton_compiles.py",
    )  # fmt: skip


POINTS = [
    Point("4", "no compilation after the warm-up, which finds the true peak", point_warm_up),
    Point("6", "all kernels compile for sm_90", point_compiles),
]
