"""Two tenants, one of which may have little waiting, and what must hold of their queue."""

from __future__ import annotations

from collections.abc import Mapping

from lorax_contract.errors import BusyError, QueueFullError
from lorax_router.core.backlog import LEAST_RETRY_S, MOST_RETRY_S, QueueDepth
from lorax_router.core.request import RequestTerms
from lorax_router.core.tenant_limits import TenantLimits

MAX_QUEUED = 12
# What the first tenant may have waiting; the other may have anything.
MAX_REQUESTS, MAX_TOKENS = 4, 60
_LIMITS = {
    "a": TenantLimits(
        queued_requests=MAX_REQUESTS, queued_tokens=MAX_TOKENS, kv_share=0.4, adapter_share=0.4
    )
}
# Of several weights, with requests of several classes.
TERMS = [
    RequestTerms(tenant, weight, priority, limits=_LIMITS.get(tenant, TenantLimits()))
    for tenant, weight in (("a", 1.0), ("b", 3.0))
    for priority in (0, 1)
]


def verify_refusal(
    error: QueueFullError | BusyError, depths: Mapping[str, QueueDepth], tenant: str, tokens: int
) -> None:
    """A tenant is refused for what itself has waiting, or since the queue of all is full."""
    assert LEAST_RETRY_S <= (error.kind.retry_after_s or 0) <= MOST_RETRY_S
    if isinstance(error, BusyError):
        assert sum(each.num_requests for each in depths.values()) == MAX_QUEUED
        return
    assert tenant == "a"
    own = depths[tenant]
    assert own.num_requests == MAX_REQUESTS or own.num_tokens + tokens > MAX_TOKENS


def verify_depths(depths: Mapping[str, QueueDepth]) -> None:
    """Nobody has more waiting than it may."""
    own = depths.get("a", QueueDepth(0, 0))
    assert own.num_requests <= MAX_REQUESTS and own.num_tokens <= MAX_TOKENS
    assert sum(each.num_requests for each in depths.values()) <= MAX_QUEUED
