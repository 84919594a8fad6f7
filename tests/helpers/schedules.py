"""Orders in which rows can be computed, for rows of ``LENGTHS`` tokens."""

from __future__ import annotations

import random

from tests.helpers.paged_runner import PagedRunner

LENGTHS = (37, 5, 22, 1, 64, 13)


def ragged(runner: PagedRunner) -> None:
    """All rows whole, in one forward pass."""
    runner.step({row: len(ids) for row, ids in enumerate(runner.rows)})


def chunked(runner: PagedRunner) -> None:
    """Rows arrive one step after the other; prompt chunks and single tokens share each step."""
    draw = random.Random(11)
    for step in range(200):
        arrived = [row for row in range(len(runner.rows)) if row <= step]
        left = {row: len(runner.rows[row]) - runner.done[row] for row in arrived}
        counts = {row: min(n, draw.choice([1, 1, 2, 7, 16])) for row, n in left.items() if n > 0}
        if counts:
            runner.step(counts)


def preempted(runner: PagedRunner) -> None:
    """Rows decode, lose their KV to others, and are recomputed with their output into other blocks."""
    runner.step({0: 20, 2: 10, 5: 4})
    for _ in range(6):
        runner.step({0: 1, 2: 1})
    runner.preempt(0)
    runner.step({4: 30, 2: 1, 1: 5})
    runner.step({0: 26, 4: 1, 5: 9})
    runner.preempt(4)
    runner.step({0: 1, 2: 1, 3: 1})
    runner.step({4: 7, 0: 10, 2: 4})
    others = range(len(LENGTHS), len(runner.rows))
    runner.step({4: 57, **{row: len(runner.rows[row]) for row in others}})


SCHEDULES = [ragged, chunked, preempted]
