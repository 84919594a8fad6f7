"""``lorax-cli`` in a pseudo-terminal, and its sentence for every kind of broken folder."""

from __future__ import annotations

from tests.acceptance.harness import Result
from tests.acceptance.suites import run_suite


def point_terminal() -> Result:
    """Run the tests that type, and those that break folders."""
    run = run_suite("tests/e2e/test_cli.py", "tests/unit/cli")
    broken = sum(
        "::test_every_kind_of_broken" in name and end == "passed" for name, end in run.ends
    )
    counts = run.counts
    return Result(
        run.is_whole and broken > 0,
        f"{counts['passed']} tests passed, {counts['failed']} failed, {counts['skipped']} skipped; "
        f"{broken} kinds of broken folders, each with its sentence",
    )
