"""What becomes of adapters beside their requests: each a line in the log, and a count."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from lorax_router.service.metrics.spec import MetricSpec

logger = logging.getLogger(__name__)

EVICTIONS = MetricSpec(
    "lorax_adapter_evictions",
    "counter",
    "Times an adapter left the shards; `reason` is room (others wait for its place) or unloaded (it "
    "was, or its name leads to another one now).",
    ("reason",),
)
QUARANTINES = MetricSpec(
    "lorax_adapter_quarantines",
    "counter",
    "Times an adapter was quarantined, since requests with it had no finite logits.",
)
EVENT_METRICS = (EVICTIONS, QUARANTINES)
_REASONS = ("room", "unloaded")


class AdapterEvents:
    """Counts and logs; of one directory."""

    def __init__(self) -> None:
        self._evictions: Counter[str] = Counter()
        self._num_quarantines = 0

    def evicted(self, adapter: str, *, is_retired: bool) -> None:
        """An adapter that was on the shards is there no more."""
        reason = "unloaded" if is_retired else "room"
        self._evictions[reason] += 1
        fields = {"event": "adapter_evicted", "level": "device", "adapter": adapter}
        logger.info(
            "adapter %s left the shards", adapter, extra={"fields": {**fields, "reason": reason}}
        )

    def quarantined(self, adapter: str, reason: str, seconds: float) -> None:
        """An adapter is let in no more for a while."""
        self._num_quarantines += 1
        fields = {"event": "adapter_quarantined", "adapter": adapter, "reason": reason}
        logger.error(
            "adapter %s is quarantined: %s", adapter, reason,
            extra={"fields": {**fields, "seconds": seconds}},
        )  # fmt: skip

    def collect(self) -> Iterator[Metric]:
        """Return the counters."""
        family = CounterMetricFamily(EVICTIONS.name, EVICTIONS.text, labels=EVICTIONS.labels)
        for reason in _REASONS:
            family.add_metric([reason], self._evictions[reason])
        yield family
        yield CounterMetricFamily(QUARANTINES.name, QUARANTINES.text, value=self._num_quarantines)
