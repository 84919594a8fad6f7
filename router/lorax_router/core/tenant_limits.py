"""What one tenant may have waiting."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """None: as much as there is."""

    # Requests that wait for their first step, and their tokens: prompt and most new ones.
    queued_requests: int | None = None
    queued_tokens: int | None = None
    # Of the server itself: whatever waits, its requests may join.
    is_exempt: bool = False


NO_LIMITS = TenantLimits()
