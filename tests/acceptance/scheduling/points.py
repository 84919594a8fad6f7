"""The points of the list: fairness, preemption, the prefix cache, classes, batching."""

from __future__ import annotations

from tests.acceptance.scheduling import (
    adapter_suites,
    alora,
    batching,
    classes,
    fairness,
    overload,
    planning,
    preemption,
    prefix,
    replay,
    victims,
)

POINTS = [
    *fairness.POINTS,
    *victims.POINTS,
    *adapter_suites.POINTS,
    *classes.POINTS,
    *prefix.POINTS,
    *alora.POINTS,
    *batching.POINTS,
    *replay.POINTS,
    *planning.POINTS,
    *overload.POINTS,
    *preemption.POINTS,
]
