"""What a step takes: a linear model of its work, given or fitted to recorded steps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


class StepWork(NamedTuple):
    """What one step computes and reads."""

    # Tokens computed, of prompts and outputs.
    tokens: int
    # Tokens in the KV cache that its rows attend to, those of the step included.
    kv_read: int
    # Of the distinct adapters in it.
    adapter_bytes: int
    # Over all tokens: the rank of the token's adapter.
    token_ranks: int


@dataclass(frozen=True, slots=True)
class LinearCost:
    """seconds = fixed + tokens, KV read, adapters' bytes and tokens x rank at a price each.

    The sum overstates a step in which reading the weights and computing overlap, by a factor
    of two at most: it is exact where one of them dominates.
    """

    fixed_s: float
    token_s: float
    kv_token_s: float = 0.0
    adapter_byte_s: float = 0.0
    token_rank_s: float = 0.0

    def seconds(self, work: StepWork) -> float:
        """Return how long a step takes."""
        return (
            self.fixed_s
            + self.token_s * work.tokens
            + self.kv_token_s * work.kv_read
            + self.adapter_byte_s * work.adapter_bytes
            + self.token_rank_s * work.token_ranks
        )


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
            steps.append(
                (StepWork(*(int(row[f]) for f in StepWork._fields)), float(row["seconds"]))
            )
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
