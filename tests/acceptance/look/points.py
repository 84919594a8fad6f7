"""The points of the list."""

from __future__ import annotations

from tests.acceptance.harness import Point
from tests.acceptance.look import playground

POINTS = [
    Point(
        "1",
        "the playground in headless Chromium: clicks, keys, keyboard, phone, axe, no foreign host",
        playground.point_playground,
    ),
]
