"""The points of the list: how fast it is on a CPU, beside its peers and beside the machine's limits."""

from __future__ import annotations

from tests.acceptance.harness import Point
from tests.acceptance.speed import adapters, interactive, peers, quantized, router, startup, steps

POINTS: list[Point] = [
    *peers.POINTS,
    *adapters.POINTS,
    *steps.POINTS,
    *interactive.POINTS,
    *router.POINTS,
    *startup.POINTS,
    *quantized.POINTS,
]
