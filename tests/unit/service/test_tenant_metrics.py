"""Metrics of tenants have a bounded number of series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from lorax_router.service.metrics.tenants import TenantUsage


def test_one_tenant_too_many_is_counted_with_the_others() -> None:
    registry = CollectorRegistry()
    usage = TenantUsage(registry, max_tenants=2)
    for tenant in ("a", "b", "c", "d", "a"):
        usage.ended(tenant, num_prompt=3, num_generated=2, failed=tenant == "b")

    def count(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"{name}_total", labels)

    requests = "lorax_tenant_request_count"
    assert [count(requests, tenant=name) for name in ("a", "b", "c", "other")] == [2, 1, None, 2]
    assert count("lorax_tenant_request_failure", tenant="b") == 1
    assert count("lorax_tenant_tokens", tenant="other", kind="prompt") == 6
    assert count("lorax_tenant_tokens", tenant="a", kind="generated") == 4
