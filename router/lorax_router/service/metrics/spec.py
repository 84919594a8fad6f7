"""One metric as its users see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """Its name, its kind, what it tells, and its labels."""

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
