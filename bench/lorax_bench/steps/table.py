"""Steps and their parts as a table."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from lorax_bench.steps.measure import PARTS, MeasuredStep


def markdown(steps: Sequence[MeasuredStep]) -> str:
    """Return the table, in milliseconds."""
    return "\n".join(_lines(steps))


def _lines(steps: Sequence[MeasuredStep]) -> Iterator[str]:
    yield "| ms | " + " | ".join(each.name for each in steps) + " |"
    yield "| --- |" + " --- |" * len(steps)
    for part in PARTS:
        if any(each.parts.get(part) for each in steps):
            yield _line(part, [each.parts.get(part, 0.0) for each in steps])
    for name in steps[0].beside:
        yield _line(f"(beside it) {name}", [each.beside[name] for each in steps])
    yield _line("**a step**", [each.step_s for each in steps])
    for name in steps[0].libraries:
        yield _line(
            f"products by {name}", [statistics.median(each.libraries[name]) for each in steps]
        )
    yield _line("weights through memory", [each.weights_s for each in steps])
    yield _line("keys and values through memory", [each.kv_s for each in steps])
    yield _line("floor", [each.floor_s for each in steps])
    ratios = (
        f"{statistics.median(each.ratios):.2f} ({min(each.ratios):.2f} to {max(each.ratios):.2f})"
        for each in steps
    )
    yield "| **step over floor** | " + " | ".join(ratios) + " |"


def _line(name: str, seconds: Sequence[float]) -> str:
    return f"| {name} | " + " | ".join(f"{1e3 * each:.2f}" for each in seconds) + " |"
