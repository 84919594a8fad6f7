"""Tables of what is shown by which tests: all of them run, told row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.acceptance.suites import SuiteRun, run_suite


@dataclass(frozen=True, slots=True)
class TableRun:
    """What the tests of a table came to, and the rows that they show."""

    suite: SuiteRun
    shown: list[str]


def run_table(table: Mapping[str, Sequence[str]]) -> TableRun:
    """Run the tests that the rows name, print what came of each row, and say which are shown.

    A row is shown where each of its tests passed, with some of its parameters at least, and none
    failed.
    """
    suite = run_suite(*sorted({test for tests in table.values() for test in tests}))
    shown = []
    for row, tests in table.items():
        ends = {test: _ends_of(test, suite) for test in tests}
        together = [end for each in ends.values() for end in each]
        passed = together.count("passed")
        print(f"    {row}: {passed} of {len(together)} passed: {', '.join(tests)}", flush=True)
        if tests and all("passed" in each for each in ends.values()) and "failed" not in together:
            shown.append(row)
    return TableRun(suite, shown)


def _ends_of(test: str, suite: SuiteRun) -> list[str]:
    return [end for name, end in suite.ends if is_of(name, test)]


def is_of(name: str, test: str) -> bool:
    """Return whether a test that ran, as JUnit names it, is one of ``path`` or ``path::name``."""
    path, _, wanted = test.partition("::")
    module, _, own = name.partition("::")
    dotted = path.removesuffix(".py").replace("/", ".")
    if module != dotted and not module.startswith(f"{dotted}."):
        return False
    return not wanted or own.partition("[")[0] == wanted
