"""The points of the list: fairness, preemption, the prefix cache, classes, batching."""

from __future__ import annotations

from tests.acceptance.scheduling import (
    alora,
    batching,
    fairness,
    overload,
    planning,
    preemption,
    prefix,
    replay,
)

POINTS = [
    *fairness.POINTS,
    *prefix.POINTS,
    *alora.POINTS,
    *batching.POINTS,
    *replay.POINTS,
    *planning.POINTS,
    *overload.POINTS,
    *preemption.POINTS,
]
