"""What tenants used, with a bounded number of series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

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

TENANT_METRICS = (TENANT_REQUESTS, TENANT_FAILURES, TENANT_TOKENS)

OTHER_TENANTS = "other"
_MAX_TENANTS = 100


class TenantUsage:
    """Counts by tenant; one too many is counted with the others."""

    def __init__(self, registry: CollectorRegistry, max_tenants: int = _MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._known: set[str] = set()
        self._requests, self._failures, self._tokens = (
            Counter(spec.name, spec.text, spec.labels, registry=registry) for spec in TENANT_METRICS
        )

    def ended(self, tenant: str, *, num_prompt: int, num_generated: int, failed: bool) -> None:
        """Count a request of a tenant."""
        if tenant not in self._known:
            if len(self._known) < self._max_tenants:
                self._known.add(tenant)
            else:
                tenant = OTHER_TENANTS
        self._requests.labels(tenant).inc()
        self._failures.labels(tenant).inc(failed)
        self._tokens.labels(tenant, "prompt").inc(num_prompt)
        self._tokens.labels(tenant, "generated").inc(num_generated)
