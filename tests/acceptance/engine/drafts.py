"""Drafts: the same tokens as transformers', greedy and drawn, and how much sooner they come."""

from __future__ import annotations

from bench import speculation
from tests.acceptance.adapters import run_fleet
from tests.acceptance.engine.served import compare_served
from tests.acceptance.harness import Point, Result
from tests.acceptance.serve import run_tests
from tests.helpers.server import Server

NUM_DRAFTED = 8
MIN_ALONE, MIN_MANY = 1.8, 1.0


def point_exact() -> Result:
    """Bit for bit on toy models: preempted, swapped, cancelled, on several ranks."""
    return run_tests(
        "tests/integration/test_speculation.py", "tests/integration/test_rank_engines.py",
        "tests/unit/engine/test_drafts.py", "tests/unit/engine/test_earlier_places.py",
        "tests/unit/engine/test_pass_prices.py", "tests/unit/core/test_booking.py",
    )  # fmt: skip


def point_equality() -> Result:
    """Greedy and drawn tokens of the default model against transformers, some preempted."""

    def kept_some(server: Server) -> tuple[bool, str]:
        drafted, kept = speculation.counts(server)
        return kept > 0, f", {kept:.0f} of {drafted:.0f} drafted tokens kept"

    return compare_served("--speculative-tokens", str(NUM_DRAFTED), seed=12, look=kept_some)


def point_adapters() -> Result:
    """Many adapters in one batch, against PEFT."""
    return run_fleet("--speculative-tokens", str(NUM_DRAFTED))


def point_speed() -> Result:
    """Twenty prompts alone, and thirty-two requests at once, with and without drafts."""
    ratios = speculation.compare(NUM_DRAFTED, num_new=128, rows=(1, 32), rounds=3)
    figure = ", ".join(f"{rows} rows {ratio:.2f}x" for rows, ratio in ratios.items())
    return Result(ratios[1] >= MIN_ALONE and ratios[32] >= MIN_MANY, figure)


POINTS = [
    Point("5x", "drafts change no token of toy models", point_exact),
    Point("5e", "drafts change no token of the default model", point_equality),
    Point("5a", "drafts change no token of adapters", point_adapters),
    Point("5s", "what drafts save", point_speed),
]
