"""Quantized weights on a CPU, beside float32 in one process, in turns.

``python -m tests.acceptance.speed.quantized`` runs these points alone, in about three minutes.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from tests.acceptance.harness import Point, Result, run_points
from tests.acceptance.serve import run_bench

LEAST_RATIO = {"int8": 1.5, "gguf": 1.8}
MOST_WORSE_PERCENT = 1.0
# Of 2,048 choices: two logits may lie closer together than float32 rounds.
MOST_OTHER_CHOICES = 1


@cache
def _figures() -> dict[str, Any]:
    return run_bench("quantized")


def point_speed() -> Result:
    """Whole decode steps at 1 and 8 rows."""
    shown, ok = [], True
    for kind, least in LEAST_RATIO.items():
        for rows, by_kind in _figures()["speed"].items():
            each = by_kind[kind]
            ok = ok and each["ratio"] >= least
            spread = f"{each['least']} to {each['most']}"
            shown.append(f"{kind} at {rows} rows {each['ratio']} ({spread})")
    return Result(ok, f"times float32: {'; '.join(shown)}")


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
