"""The names of what is counted when shards are lost and come back."""

from __future__ import annotations

from lorax_router.service.metrics.spec import MetricSpec

SHARDS_LOST = MetricSpec(
    "lorax_shards_lost", "counter", "Times that the shards were lost: they died, or hung."
)
SHARDS_LOST_DURATION = MetricSpec(
    "lorax_shards_lost_duration",
    "histogram",
    "Seconds from the loss of shards until others took their place.",
)
EPOCH = MetricSpec(
    "lorax_epoch", "gauge", "1 at first, one more with each restart of the shards or of the router."
)
