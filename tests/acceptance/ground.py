"""Solid ground: the points of its "Done means" list."""

from __future__ import annotations

import subprocess
import sys

from tests.acceptance import attacks, connections
from tests.acceptance.faults import FAULTS
from tests.acceptance.harness import Point, Result
from tests.acceptance.serve import run_tests
from tests.acceptance.suites import ROOT, point_gpu, run_suite


def point_faults() -> Result:
    """Run what failed before each fault was mended; print them by fault."""
    missing: list[str] = []
    short: list[str] = []
    run = run_suite(*sorted({test for tests in FAULTS.values() for test in tests}))
    for fault, tests in FAULTS.items():
        ends = [end for name, end in run.ends if any(_is_of(name, test) for test in tests)]
        passed = ends.count("passed")
        print(f"    {fault}: {passed} of {len(ends)} passed: {', '.join(tests)}", flush=True)
        if not passed:
            missing.append(fault)
        elif "failed" in ends:
            short.append(fault)
    ok = run.is_clean and not missing and not short
    figure = f"{len(FAULTS)} faults, {run.counts['passed']} tests passed"
    return Result(ok, figure + f"; without a test: {missing}; failed: {short}" * (not ok))


def _is_of(name: str, test: str) -> bool:
    """Return whether a test that ran, as JUnit names it, is one of ``path`` or ``path::name``."""
    path, _, wanted = test.partition("::")
    module, _, own = name.partition("::")
    return path.removesuffix(".py").replace("/", ".") in module and own.startswith(wanted)


def point_newest() -> Result:
    """The suite with the newest release of everything, in an environment made for it."""
    done = subprocess.run(["make", "newest"], cwd=ROOT, text=True, capture_output=True, check=False)
    ends = [line for line in done.stdout.splitlines() if " passed" in line]
    return Result(done.returncode == 0, "; ".join(ends) or done.stderr[-200:])


def point_structure() -> Result:
    """No circles, no prefix that three files share, no class name with two meanings."""
    return run_tests("tests/architecture")


def point_kernels() -> Result:
    """Every kernel compiled for a GPU that is not there, and no step after the warm-up compiles."""
    return run_tests(
        "tests/unit/attention/test_triton_compiles.py",
        "tests/unit/lora/test_triton_compiles.py",
        "tests/unit/model/test_compiles_at_warm_up.py",
    )


def _bench(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"bench.{name}", *arguments],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    print(done.stdout, flush=True)
    return done.stdout


POINTS = [
    Point("1", "each fault has a test that failed before and passes now", point_faults),
    Point("1n", "make newest", point_newest),
    *attacks.points(),
    *connections.points(),
    Point("4", "the shape of the house", point_structure),
    Point("5", "make gpu-check in its small form", point_gpu),
    Point("5k", "every kernel fits a GPU, and is compiled at the warm-up", point_kernels),
]
