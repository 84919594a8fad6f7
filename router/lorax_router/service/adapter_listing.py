"""Adapters as a list shows them: name, state, bytes per tier, use, why one is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorax_contract.adapters import (
    AdapterContent,
    AdapterRef,
    AdapterTiers,
    AdapterUnavailableError,
    FetchedAdapter,
)
from lorax_router.core.adapters import AdapterRecord


@dataclass(slots=True)
class NameRecord:
    """What is known of a name."""

    ref: AdapterRef
    # Requests that wait for the name to be resolved.
    num_resolving: int = 0
    # The content that it leads to now.
    content_key: str | None = None
    fetched: FetchedAdapter | None = None
    # Why it could not be had when it was last asked for.
    failure: AdapterUnavailableError | None = None
    is_pinned: bool = False
    num_uses: int = 0
    # Unix time.
    last_used_at: float | None = None


def state_of(name: NameRecord, record: AdapterRecord | None) -> str:
    """Return where an adapter stands, in one word.

    resolving, refused (for good), failed (a later try may succeed), absent (known, not on
    the shards), preparing, resident, draining (must make room), releasing.
    """
    if name.num_resolving:
        return "resolving"
    if record is None:
        if name.failure is None:
            return "absent"
        return "refused" if name.failure.reason.permanent else "failed"
    return "draining" if record.drained_at is not None else record.state.value


def document(
    name: NameRecord,
    record: AdapterRecord | None,
    content: AdapterContent | None,
    tiers: AdapterTiers,
) -> dict[str, Any]:
    """Return one entry of the list, as JSON has it."""
    ref, fetched, failure = name.ref, name.fetched, name.failure
    parts = content.parts if content is not None else ()
    handle = record.handle if record is not None else None
    device = tiers.device.get(handle) if handle is not None else None
    return {
        "adapter_id": ref.id,
        "adapter_source": ref.source,
        "revision": ref.revision,
        "version": None if fetched is None else fetched.version,
        "content_digest": None if content is None else content.key,
        "rank": None if fetched is None else fetched.max_rank,
        "state": state_of(name, record),
        "pinned": name.is_pinned,
        "bytes": {
            "device": 0 if device is None else device[1],
            "host": sum(tiers.host.get(part.content_digest, 0) for part in parts),
            "disk": sum(tiers.disk.get(part.store_digest, 0) for part in parts),
        },
        "waiting": 0 if record is None else record.num_waiting,
        "running": 0 if record is None else record.num_running,
        "uses": name.num_uses,
        "last_used": name.last_used_at,
        "failure": None
        if failure is None
        else {"reason": failure.reason.value, "text": failure.text},
    }
