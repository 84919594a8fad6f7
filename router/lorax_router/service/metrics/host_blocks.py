"""Series about KV blocks in host memory."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lorax_router.core.stats import HostBlockStats
from lorax_router.service.metrics.spec import MetricSpec

HOST_BLOCKS = MetricSpec(
    "lorax_kv_host_blocks", "gauge", "KV blocks in host memory (`--swap-space`)."
)
HOST_BLOCKS_HELD = MetricSpec(
    "lorax_kv_host_blocks_held", "gauge", "Those of them that hold requests which gave way."
)
HOST_BLOCKS_CACHED = MetricSpec(
    "lorax_kv_host_blocks_cached", "gauge", "Those of them that only the prefix cache may use."
)
SWAPPED_OUT = MetricSpec(
    "lorax_requests_swapped_out",
    "counter",
    "Times a request that gave way was moved to host memory; `lorax_requests_preempted` less "
    "these: computed again.",
)
BYTES_OUT = MetricSpec(
    "lorax_kv_bytes_moved_out", "counter", "Bytes of KV copied to host memory, on all ranks."
)
BYTES_IN = MetricSpec(
    "lorax_kv_bytes_moved_in", "counter", "Bytes of KV copied back from host memory, on all ranks."
)

HOST_BLOCK_METRICS = (
    HOST_BLOCKS, HOST_BLOCKS_HELD, HOST_BLOCKS_CACHED, SWAPPED_OUT, BYTES_OUT, BYTES_IN,
)  # fmt: skip


def host_block_series(stats: HostBlockStats, block_bytes: int) -> Iterator[Metric]:
    """Yield a snapshot; ``block_bytes`` are those of a block on all ranks."""
    for spec, value in (
        (HOST_BLOCKS, stats.num_blocks),
        (HOST_BLOCKS_HELD, stats.num_held),
        (HOST_BLOCKS_CACHED, stats.num_cached),
    ):
        yield GaugeMetricFamily(spec.name, spec.text, value=value)
    for spec, value in (
        (SWAPPED_OUT, stats.num_swaps),
        (BYTES_OUT, stats.num_moved_out * block_bytes),
        (BYTES_IN, stats.num_moved_in * block_bytes),
    ):
        yield CounterMetricFamily(spec.name, spec.text, value=value)
