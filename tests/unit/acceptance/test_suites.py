"""What acceptance runs read out of pytest's output."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.acceptance.suites import ROOT, SuiteRun, figures_of, run_suite

OUTPUT = """
..FIGURE llama 3.6e-06
.FIGURE llama on 3 ranks 4.0e-06
    def test_family(family: str) -> None:
>       print(f"FIGURE {family} {largest:.1e}")
E       ValueError
FIGURE gemma2 1.0e-06
"""


def test_figures_are_printed_lines_not_the_source_of_a_failed_test() -> None:
    assert figures_of(OUTPUT) == ["llama 3.6e-06", "llama on 3 ranks 4.0e-06", "gemma2 1.0e-06"]


TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.skip(reason="there is no such machine")
def test_elsewhere(): pass
"""


def test_acceptance_runs_slow_tests_too(tmp_path: Path) -> None:
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    # Its options are those of the suite, which leave slow tests out.
    run = run_suite("-c", str(ROOT / "pyproject.toml"), str(path))
    assert run.counts == {"passed": 2, "skipped": 1}
    assert run.reasons == {"there is no such machine": 1}
    assert run.is_clean


@pytest.mark.parametrize(
    ("ends", "is_whole"),
    [
        (["passed"], True),
        (["passed", "skipped"], False),
        (["passed", "failed"], False),
        ([], False),
    ],
)
def test_a_run_that_skips_some_is_not_whole(ends: list[str], is_whole: bool) -> None:
    run = SuiteRun(0, [], [(f"test_{number}", end) for number, end in enumerate(ends)])
    assert run.is_whole is is_whole
