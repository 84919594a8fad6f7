"""What tenants used, with a bounded number of series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric

from lorax_router.core.backlog import QueueDepth
from lorax_router.service.metrics.spec import MetricSpec

TENANT_REQUESTS = MetricSpec(
    "lorax_tenant_request_count",
    "counter",
    "Requests that ended, by the tenant whose key they had. The first 100 tenants that come have "
    "a value of `tenant` each, the others count as other; without keys there is none.",
    ("tenant",),
)
TENANT_FAILURES = MetricSpec(
    "lorax_tenant_request_failure",
    "counter",
    "Requests of a tenant that failed, those that a quota refused among them.",
    ("tenant",),
)
TENANT_TOKENS = MetricSpec(
    "lorax_tenant_tokens",
    "counter",
    "Tokens of a tenant's requests that ended; `kind` is prompt or generated.",
    ("tenant", "kind"),
)

REJECTED = MetricSpec(
    "lorax_request_rejected",
    "counter",
    "Requests that were rejected since too much is there or too little time is left; `reason` is "
    "queue_full, overloaded, quota, deadline or shutting_down as `err` of `lorax_request_failure`; "
    "`tenant` is empty where the server has no keys.",
    ("tenant", "reason"),
)
QUEUE_REQUESTS = MetricSpec(
    "lorax_tenant_queue_requests",
    "gauge",
    "Requests of a tenant that wait for their first step; preempted ones are not among them.",
    ("tenant",),
)
QUEUE_TOKENS = MetricSpec(
    "lorax_tenant_queue_tokens",
    "gauge",
    "Tokens of these: of their prompts, and the most that they may generate.",
    ("tenant",),
)

_COUNTED = (TENANT_REQUESTS, TENANT_FAILURES, TENANT_TOKENS, REJECTED)
TENANT_METRICS = (*_COUNTED, QUEUE_REQUESTS, QUEUE_TOKENS)

OTHER_TENANTS = "other"
_MAX_TENANTS = 100


class TenantUsage:
    """Counts by tenant; one too many is counted with the others."""

    def __init__(self, registry: CollectorRegistry, max_tenants: int = _MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._known: set[str] = set()
        # Labels of those that had something waiting when somebody looked.
        self._waited: set[str] = set()
        self._requests, self._failures, self._tokens, self._rejected = (
            Counter(spec.name, spec.text, spec.labels, registry=registry) for spec in _COUNTED
        )

    def ended(self, tenant: str, *, num_prompt: int, num_generated: int, failed: bool) -> None:
        """Count a request of a tenant."""
        tenant = self._label(tenant)
        self._requests.labels(tenant).inc()
        self._failures.labels(tenant).inc(failed)
        self._tokens.labels(tenant, "prompt").inc(num_prompt)
        self._tokens.labels(tenant, "generated").inc(num_generated)

    def rejected(self, tenant: str, reason: str) -> None:
        """Count a request that there was no place or no time for."""
        self._rejected.labels(self._label(tenant), reason).inc()

    def depths(self, depths: Mapping[str, QueueDepth]) -> Iterator[Metric]:
        """Return what tenants have waiting; those that had something before are there with 0."""
        requests = dict.fromkeys(self._waited, 0)
        tokens = dict.fromkeys(self._waited, 0)
        for tenant, depth in depths.items():
            label = self._label(tenant)
            self._waited.add(label)
            requests[label] = requests.get(label, 0) + depth.num_requests
            tokens[label] = tokens.get(label, 0) + depth.num_tokens
        for spec, values in ((QUEUE_REQUESTS, requests), (QUEUE_TOKENS, tokens)):
            family = GaugeMetricFamily(spec.name, spec.text, labels=spec.labels)
            for label, value in values.items():
                family.add_metric([label], value)
            yield family

    def _label(self, tenant: str) -> str:
        """Return the value that stands for a tenant: its name, while there are few."""
        if tenant and tenant not in self._known:
            if len(self._known) >= self._max_tenants:
                return OTHER_TENANTS
            self._known.add(tenant)
        return tenant
