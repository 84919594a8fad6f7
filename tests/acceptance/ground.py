"""Solid ground: the points of its "Done means" list."""

from __future__ import annotations

from tests.acceptance import attacks

POINTS = [*attacks.points()]
