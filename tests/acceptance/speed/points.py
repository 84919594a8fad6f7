"""The points of the list: how fast it is on a CPU, beside its peers and beside the machine's limits."""

from __future__ import annotations

from tests.acceptance.harness import Point

POINTS: list[Point] = []
