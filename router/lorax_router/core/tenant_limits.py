"""What one tenant may have waiting, and what it may hold while others want it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """None: as much as there is. Shares are soft: what nobody else wants is lent."""

    # Requests that wait for their first step, and their tokens: prompt and most new ones.
    queued_requests: int | None = None
    queued_tokens: int | None = None
    # Of the KV blocks, from 0 to 1: rows and cached prefixes together.
    kv_share: float | None = None
    # Of the slots and of the memory for adapters, from 0 to 1.
    adapter_share: float | None = None
    # Of the server itself: whatever waits, its requests may join.
    is_exempt: bool = False


NO_LIMITS = TenantLimits()
