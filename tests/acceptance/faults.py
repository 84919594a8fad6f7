"""What once went wrong, and the tests that failed then: by a short name each."""

from __future__ import annotations

FAULTS: dict[str, tuple[str, ...]] = {
    "a style of tomorrow's transformers refuses a model": (
        "tests/unit/parallel/test_styles.py",
        "tests/integration/test_families.py::test_a_style_that_is_not_known_costs_a_copy_of_its_block_and_no_answer",
    ),
    "figures are read from the source of a failed test": ("tests/unit/acceptance/test_suites.py",),
    "the router is blamed for the end of a shard": (
        "tests/unit/launcher/test_supervisor.py::test_a_dead_shard_is_blamed_for_the_router_that_misses_it",
    ),
}
