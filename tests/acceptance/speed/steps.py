"""Steps of a shard beside what the machine could do: its memory, and the best library's products."""

from __future__ import annotations

import functools
import statistics

from tests.acceptance.harness import Point, Result

from lorax_bench.steps.measure import MeasuredStep
from lorax_bench.steps.run import measure_steps
from lorax_bench.steps.table import markdown

_ROWS, _CHUNK = (1, 8, 32, 64), 512
_MOST_OF_FLOOR, _LEAST_OF_RATE = 1.25, 0.80


@functools.cache
def _steps() -> dict[str, MeasuredStep]:
    steps = measure_steps(None, _ROWS, (_CHUNK,), rounds=7)
    print(markdown(steps), flush=True)
    return {each.name: each for each in steps}


def _decodes() -> Result:
    found = {rows: _steps()[f"{rows} rows"] for rows in _ROWS}
    medians = {rows: statistics.median(each.ratios) for rows, each in found.items()}
    figures = ", ".join(
        f"{rows}: {medians[rows]:.2f} ({min(each.ratios):.2f} to {max(each.ratios):.2f})"
        for rows, each in found.items()
    )
    return Result(
        max(medians.values()) <= _MOST_OF_FLOOR,
        f"a step over its floor, by rows: {figures}; at most {_MOST_OF_FLOOR}",
    )


def _chunk() -> Result:
    times = _steps()[f"prompt of {_CHUNK}"]
    libraries = zip(*times.libraries.values(), strict=True)
    rates = [min(each) / step for each, step in zip(libraries, times.step, strict=True)]
    rate = statistics.median(rates)
    return Result(
        rate >= _LEAST_OF_RATE,
        f"{rate:.2f} ({min(rates):.2f} to {max(rates):.2f}) of the best library's rate for its products; "
        f"at least {_LEAST_OF_RATE}",
    )


POINTS = [
    Point("4d", "a decode step of 1, 8, 32 and 64 rows over its floor", _decodes),
    Point("4p", "a step of 512 prompt tokens beside the best library's products", _chunk),
]
