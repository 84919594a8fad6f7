"""Long runs, each a command of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.acceptance.harness import Result
from tests.fuzz.playing import KINDS

ROOT = Path(__file__).parents[3]


def _run(module: str, *arguments: str) -> Result:
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = run.stdout.strip().splitlines()
    print("\n".join(f"    {line}" for line in lines), run.stderr[-2000:], flush=True)
    return Result(run.returncode == 0, "; ".join(lines[-12:]))


def point_soak() -> Result:
    """Ten minutes."""
    return _run("tests.soak", "--minutes", "10")


def point_fuzz() -> Result:
    """Ten minutes."""
    return _run("tests.fuzz", "--minutes", "10")


def point_planted() -> Result:
    """Each of five faults is found within ten minutes."""
    results = {kind: _run("tests.fuzz", "--minutes", "10", "--planted", kind) for kind in KINDS}
    figure = "; ".join(f"{kind}: {each.figure[-160:]}" for kind, each in results.items())
    return Result(all(each.ok for each in results.values()), figure)
