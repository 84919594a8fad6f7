"""Quantized weights on a CPU, beside float32 in one process, in turns.

Where a process has its memory can make one kind of weights half as fast again as in the next
process, so several are asked. ``python -m tests.acceptance.speed.quantized`` runs these points alone,
in about five minutes.
"""

from __future__ import annotations

import statistics
import sys
from functools import cache
from typing import Any

from tests.acceptance.harness import Point, Result, run_points
from tests.acceptance.serve import run_bench

LEAST_RATIO = {"int8": 1.5, "gguf": 1.8}
NUM_PROCESSES = 5
MOST_WORSE_PERCENT = 1.0
# Of 2,048 choices: two logits may lie closer together than float32 rounds.
MOST_OTHER_CHOICES = 1


@cache
def _figures() -> dict[str, Any]:
    return run_bench("quantized")


@cache
def _speeds() -> list[dict[str, Any]]:
    others = [run_bench("quantized", "--tokens", "64") for _ in range(NUM_PROCESSES - 1)]
    return [each["speed"] for each in (_figures(), *others)]


def point_speed() -> Result:
    """Whole decode steps at 1 and 8 rows: of each process its median, and the median of those."""
    shown, ok = [], True
    for kind, least in LEAST_RATIO.items():
        for rows in _speeds()[0]:
            ratios = [speed[rows][kind]["ratio"] for speed in _speeds()]
            ok = ok and statistics.median(ratios) >= least
            spread = f"{min(ratios)} to {max(ratios)}"
            shown.append(f"{kind} at {rows} rows {statistics.median(ratios)} ({spread})")
    return Result(ok, f"times float32, by processes: {'; '.join(shown)}")


def point_perplexity() -> Result:
    """Of a page of the documentation."""
    found = _figures()["perplexity"]
    worse = found["int8"]["worse_percent"]
    figures = f"{found['none']['perplexity']} in float32, {worse} % more in int8"
    return Result(worse <= MOST_WORSE_PERCENT, f"{figures} ({found['tokens']} tokens)")


def point_blocks() -> Result:
    """Greedy choices, and the probability of a text."""
    found = _figures()["perplexity"]["gguf"]
    ok = found["other_choices"] <= MOST_OTHER_CHOICES and abs(found["worse_percent"]) < 0.01
    return Result(
        ok,
        f"{found['other_choices']} other choices than in float32, perplexity "
        f"{found['worse_percent']} % more",
    )


POINTS = [
    Point(
        "7s", "int8 >= 1.5x, GGUF's 4 bits >= 1.8x float32's tokens/s at 1 and 8 rows", point_speed
    ),
    Point("7p", "int8's perplexity at most 1 % worse than float32's", point_perplexity),
    Point("7g", "weights in a GGUF file's blocks are the dequantized ones", point_blocks),
]

if __name__ == "__main__":
    sys.exit(run_points(POINTS, set(sys.argv[1:])))
