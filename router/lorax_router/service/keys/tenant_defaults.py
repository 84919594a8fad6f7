"""What counts for tenants of whom the keys say nothing else."""

from __future__ import annotations

import math

from lorax_contract.config import RouterConfig
from lorax_router.core.tenant_limits import TenantLimits


def tenant_limits(config: RouterConfig) -> TenantLimits:
    """Return what a tenant may have waiting and may hold of whom the keys say nothing else.

    Where the keys tell several tenants apart, none of them has more waiting than half of what
    may wait or be in the server at all: what is left is for the others.
    """
    requests, tokens = config.tenant_queued_requests, config.tenant_queued_tokens
    if config.api_keys_file is not None:
        most = min(config.max_concurrent_requests, config.max_queued_requests or math.inf)
        requests = max(1, int(most) // 2) if requests is None else requests
        if tokens is None and config.max_queued_tokens is not None:
            tokens = max(1, config.max_queued_tokens // 2)
    return TenantLimits(
        queued_requests=requests,
        queued_tokens=tokens,
        kv_share=config.tenant_kv_share,
        adapter_share=config.tenant_adapter_share,
    )
