"""Writes ``docs/metrics.md`` from the table of metrics: ``python -m`` this module."""

from __future__ import annotations

import sys

from lorax_router.service.metrics.recorder import ALL_METRICS
from lorax_router.service.metrics.spec import MetricSpec

_HEAD = """\
# Metrics

`GET /metrics` answers in Prometheus' text format, or as JSON when the `Accept` header
names `application/json`. This page is generated: `python -m lorax_router.service.metrics.doc >
docs/metrics.md`.

Names, types and buckets that LoRAX has are LoRAX's. Durations are in seconds, in 35 buckets from
0.00015 to 145.6, each 1.5 times the one before. Histograms of tokens have 100 equal buckets up to
the server's limit.

| name | type | labels | meaning |
| --- | --- | --- | --- |
"""


def metrics_page() -> str:
    """Return the whole page."""
    return _HEAD + "".join(map(_row, ALL_METRICS))


def _row(spec: MetricSpec) -> str:
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    return f"| `{spec.name}` | {spec.kind} | {labels} | {spec.text} |\n"


if __name__ == "__main__":
    sys.stdout.write(metrics_page())
