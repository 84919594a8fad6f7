"""The prices of a step, fitted to recorded ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

import numpy as np

from lorax_router.core.cost import LinearCost, StepWork


def fit_cost(steps: Iterable[tuple[StepWork, float]]) -> LinearCost:
    """Return the prices that explain recorded steps best: least squares, none negative.

    What would get a negative price (two kinds of work that always grow together share their
    price in any way) is left out, and the others are fitted again.
    """
    recorded = list(steps)
    work = np.array([[1.0, *each] for each, _ in recorded], dtype=np.float64)
    seconds = np.array([each for _, each in recorded], dtype=np.float64)
    if len(recorded) < 2:
        raise ValueError("a cost model needs at least two recorded steps")
    prices = np.zeros(work.shape[1])
    # Columns are brought to one scale: bytes and tokens are nine orders apart.
    scale = work.max(axis=0)
    used = np.flatnonzero(scale)
    while len(used):
        found = np.linalg.lstsq(work[:, used] / scale[used], seconds, rcond=None)[0]
        if found.min() >= 0:
            prices[used] = found / scale[used]
            break
        used = np.delete(used, found.argmin())
    return LinearCost(*(float(price) for price in prices))


def read_steps(path: Path) -> list[tuple[StepWork, float]]:
    """Read recorded steps: one JSON object a line, StepWork's fields and ``seconds``."""
    steps = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            known = {f: int(row[f]) for f in StepWork._fields if f != "attended"}
            work = StepWork(**known, attended=int(row.get("attended", 0)))
            steps.append((work, float(row["seconds"])))
        except (KeyError, TypeError, ValueError):
            names = ", ".join([*StepWork._fields, "seconds"])
            raise ValueError(f"{path}:{number}: a step is a JSON object with {names}") from None
    return steps


def error_of(cost: LinearCost, steps: Iterable[tuple[StepWork, float]]) -> float:
    """Return the median of |predicted - recorded| / recorded."""
    return float(np.median([abs(cost.seconds(work) - s) / s for work, s in steps if s > 0]))


def prices_of(cost: LinearCost) -> tuple[float, ...]:
    """Return the prices in the order of the fields."""
    return astuple(cost)
