"""What goes wrong in LoRAX and not here: the table of ``docs/reliability.md``, and its tests."""

from __future__ import annotations

import re

from tests.acceptance.harness import Result
from tests.acceptance.named_tests import ROOT, tests_in
from tests.acceptance.tables import run_table

PAGE = "docs/reliability.md"
# As the study of LoRAX counts them.
NUMBERS = tuple(f"W{number}" for number in range(1, 37))


def weaknesses() -> dict[str, list[str]]:
    """Return the tests that show each weakness, by its number.

    Raises ValueError for a number that has two rows.
    """
    table: dict[str, list[str]] = {}
    for number, row in re.findall(r"^\| (W\d+) \|(.*)", (ROOT / PAGE).read_text(), re.MULTILINE):
        if number in table:
            raise ValueError(f"{PAGE} has two rows for {number}")
        table[number] = tests_in(row)
    return table


def point_weaknesses() -> Result:
    """Run all tests that the table names; a weakness is shown if those of its row pass."""
    table = weaknesses()
    run = run_table(table)
    missing = [number for number in NUMBERS if number not in run.shown]
    figure = f"{len(NUMBERS) - len(missing)} of {len(NUMBERS)} shown not to be here"
    figure += f", {run.suite.counts['passed']} tests passed"
    return Result(not missing and run.suite.is_clean, figure + f"; not: {missing}" * bool(missing))
