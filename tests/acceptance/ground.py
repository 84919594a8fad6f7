"""Solid ground: the points of its "Done means" list."""

from __future__ import annotations

import subprocess
from collections import Counter

from tests.acceptance import attacks, connections
from tests.acceptance.harness import Point, Result
from tests.acceptance.regressions import REGRESSIONS
from tests.acceptance.serve import run_bench, run_tests
from tests.acceptance.suites import ROOT, point_gpu, run_suite
from tests.acceptance.tables import run_table

MAX_STORE_RATIO = 1.5


def point_faults() -> Result:
    """Run the tests of each fault; print them by fault."""
    run = run_table(REGRESSIONS)
    missing = [fault for fault in REGRESSIONS if fault not in run.shown]
    ok = run.suite.is_clean and not missing
    figure = f"{len(REGRESSIONS)} faults, {run.suite.counts['passed']} tests passed"
    return Result(ok, figure + f"; not shown: {missing}" * (not ok))


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
    return run_whole(
        "tests/unit/attention/test_triton_compiles.py",
        "tests/unit/lora/test_triton_compiles.py",
        "tests/unit/model/test_compiles_at_warm_up.py",
    )


def run_whole(*arguments: str) -> Result:
    """Run tests of which none may be skipped."""
    run = run_suite(*arguments)
    for reason, number in run.reasons.items():
        print(f"    {number} skipped: {reason}", flush=True)
    by_file = Counter(name.partition("::")[0].rpartition(".")[2] for name, _ in run.ends)
    print("    " + ", ".join(f"{name} {number}" for name, number in by_file.items()), flush=True)
    counts = run.counts
    figure = ", ".join(f"{counts[end]} {end}" for end in ("passed", "skipped", "failed"))
    return Result(run.is_whole, figure)


def point_slow() -> Result:
    """Every test that ``make test`` leaves out."""
    return run_whole("-m", "slow", "tests")


def point_store() -> Result:
    """A fetch and a list page with 10 entries in the store and with 100,000."""
    figures = run_bench("store")
    ratios = {kind: more / less for kind, (less, more) in figures.items()}
    # Once a start, by design: every name is looked at.
    ratios.pop("start_ms")
    shown = ", ".join(f"{kind} {ratio:.2f}x" for kind, ratio in ratios.items())
    return Result(max(ratios.values()) <= MAX_STORE_RATIO, shown)


def point_plan() -> Result:
    """Planning with 1,000 known adapters of which 500 wait."""
    plan_ms = run_bench("router")["plan_adapters_ms_p50"]
    return Result(max(plan_ms.values()) <= 1.0, f"plan {plan_ms} ms (by depth)")


def point_silent_call() -> Result:
    """A call to a shard that is silent for longer than gRPC's pings like."""
    return run_whole("tests/integration/shards/test_grpc_client.py")


POINTS = [
    Point("1", "each fault has a test, and it passes", point_faults),
    Point("1n", "make newest", point_newest),
    *attacks.points(),
    *connections.points(),
    Point("3s", "100,000 store entries cost what 10 cost", point_store),
    Point("3p", "1,000 known adapters, 500 wait: plan <= 1 ms", point_plan),
    Point("T22", "a call that is silent for minutes", point_silent_call),
    Point("1s", "what `make test` leaves out for being slow", point_slow),
    Point("4", "the shape of the house", point_structure),
    Point("5", "make gpu-check in its small form", point_gpu),
    Point("5k", "every kernel fits a GPU, and is compiled at the warm-up", point_kernels),
]
