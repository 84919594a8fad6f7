"""Writes a registry as Prometheus text or as JSON, with LoRAX's names.

``prometheus_client`` appends ``_total`` to counters and cannot be told not to;
LoRAX's counters have plain names, which dashboards rely on. So its text form is
written here, from the samples that it collects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.samples import Sample

TEXT_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def to_text(registry: CollectorRegistry) -> bytes:
    """Return all metrics in Prometheus' text format 0.0.4."""
    lines = []
    for metric in registry.collect():
        text = metric.documentation.replace("\\", r"\\").replace("\n", r"\n")
        lines.append(f"# HELP {metric.name} {text}")
        lines.append(f"# TYPE {metric.name} {metric.type}")
        for name, sample in _samples(metric):
            lines.append(f"{name}{_labels(sample)} {_number(sample.value)}")
    return ("\n".join(lines) + "\n").encode()


def to_json(registry: CollectorRegistry) -> bytes:
    """Return all metrics as one object: name to its type and its samples."""
    document = {
        metric.name: {
            "type": metric.type,
            "data": [
                {"key": f"{name}{_labels(sample)}", "value": sample.value}
                for name, sample in _samples(metric)
            ],
        }
        for metric in registry.collect()
    }
    # Here, so that counting needs no package for a form that only a front end asks for.
    import orjson

    return orjson.dumps(document)


def _samples(metric: Metric) -> Iterator[tuple[str, Sample]]:
    """The samples under their plain names, without the times at which they were created."""
    for sample in metric.samples:
        if sample.name.endswith("_created"):
            continue
        is_counter = metric.type == "counter"
        yield (metric.name if is_counter else sample.name), sample


def _labels(sample: Sample) -> str:
    if not sample.labels:
        return ""
    escaped = (
        (name, value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\""))
        for name, value in sorted(sample.labels.items())
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
