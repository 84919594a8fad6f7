"""What acceptance runs read out of pytest's output."""

from __future__ import annotations

from tests.acceptance.suites import figures_of

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
