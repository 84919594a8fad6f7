"""Tables of what tests show: the rows that they must have, and what a run says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.acceptance import tables
from tests.acceptance.faults import weaknesses
from tests.acceptance.named_tests import is_there
from tests.acceptance.suites import SuiteRun
from tests.acceptance.tables import is_of, run_table


def test_each_weakness_of_lorax_has_one_row_and_tests_that_exist() -> None:
    table = weaknesses.weaknesses()
    assert tuple(table) == weaknesses.NUMBERS
    assert len(table) == 36
    for number, tests in table.items():
        assert tests, f"{number} names no test"
        assert [test for test in tests if not is_there(test)] == []
        assert all("::" in test for test in tests), f"{number} names a whole file"


def test_a_row_that_is_there_twice_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / weaknesses.PAGE).write_text("| W1 | a | b | `tests/x.py::y` |\n| W1 | a |\n")
    monkeypatch.setattr(weaknesses, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="two rows for W1"):
        weaknesses.weaknesses()


def test_a_row_is_shown_where_each_of_its_tests_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [
        ("tests.unit.test_a::test_one[x]", "passed"), ("tests.unit.test_a::test_one[y]", "skipped"),
        ("tests.unit.test_a::test_two", "failed"), ("tests.unit.test_a::test_three", "skipped"),
    ]  # fmt: skip
    monkeypatch.setattr(tables, "run_suite", lambda *tests: SuiteRun(0, [], ends))
    here = "tests/unit/test_a.py"
    run = run_table(
        {
            "fine": [f"{here}::test_one"],
            "failed": [f"{here}::test_one", f"{here}::test_two"],
            "skipped": [f"{here}::test_one", f"{here}::test_three"],
            "did not run": [f"{here}::test_one", f"{here}::test_four"],
            "whole file": [here],
            "nothing": [],
        }
    )
    assert run.shown == ["fine"]


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("tests/unit/test_a.py", True),
        ("tests/unit/test_a.py::test_one", True),
        ("tests/unit/test_a.py::test_on", False),
        ("tests/unit/test_b.py::test_one", False),
        ("unit/test_a.py::test_one", False),
    ],
)
def test_tests_are_known_by_their_whole_names(test: str, found: bool) -> None:
    assert is_of("tests.unit.test_a::test_one[x-y]", test) == found
