"""The points of the list: fairness, preemption, the prefix cache, classes, batching."""

from __future__ import annotations

from tests.acceptance.scheduling import alora, batching, fairness, overload

POINTS = [
    *fairness.POINTS,
    *batching.POINTS,
    *alora.POINTS,
    *overload.POINTS,
]
