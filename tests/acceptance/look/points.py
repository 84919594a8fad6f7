"""The points of the list."""

from __future__ import annotations

from tests.acceptance.harness import Point
from tests.acceptance.look import alerts, documented, playground, terminal

POINTS = [
    Point(
        "1",
        "the playground in headless Chromium: clicks, keys, keyboard, phone, axe, no foreign host",
        playground.point_playground,
    ),
    Point(
        "2",
        "lorax-cli in a pseudo-terminal; adapters check for every broken folder",
        terminal.point_terminal,
    ),
    Point(
        "3",
        "every alert fires by its cause and none before; dashboards name what is there (10 min)",
        alerts.point_alerts,
    ),
    Point("4", "all commands of README and docs run (10 to 16 min)", documented.point_documented),
]
