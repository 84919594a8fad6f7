"""Pages name tests that exist: one that was moved would guard nothing."""

from __future__ import annotations

import pytest
from tests.acceptance.named_tests import ROOT, is_there, named_in, rows_of

PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_are_there(page: str) -> None:
    assert [name for name in named_in(page) if not is_there(name)] == []


def test_each_attack_names_what_shows_its_end() -> None:
    rows = rows_of("security.md", "Attacks")
    assert len(rows) > 30
    assert [attack for attack, tests in rows.items() if not tests] == []


@pytest.mark.parametrize(
    ("heading", "words"), [("Nothing", "no heading"), ("Secrets", "no table below")]
)
def test_a_page_without_the_table_is_noticed(heading: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rows_of("security.md", heading)


def test_a_test_that_was_moved_is_noticed() -> None:
    here = "tests/unit/acceptance/test_named_tests.py"
    assert is_there(here)
    assert is_there(f"{here}::test_a_test_that_was_moved_is_noticed")
    assert not is_there(f"{here}::test_a_test_that_was_moved")
    assert not is_there("tests/unit/acceptance/test_other_tests.py")


def test_pages_name_tests() -> None:
    assert "tests/unit/attention/test_same_bits.py" in named_in("performance.md")
