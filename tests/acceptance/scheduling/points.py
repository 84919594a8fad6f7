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
    served_classes,
    served_shares,
    victims,
    working_set,
)

POINTS = [
    *fairness.POINTS,
    *victims.POINTS,
    *served_shares.POINTS,
    *adapter_suites.POINTS,
    *working_set.POINTS,
    *preemption.POINTS,
    *prefix.POINTS,
    *alora.POINTS,
    *classes.POINTS,
    *served_classes.POINTS,
    *batching.POINTS,
    *replay.POINTS,
    *planning.POINTS,
    *overload.POINTS,
]
