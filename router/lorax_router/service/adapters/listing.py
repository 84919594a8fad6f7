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
from lorax_contract.step import AdapterHandle
from lorax_router.core.adapter_table import AdapterRecord


@dataclass(slots=True)
class KnownName:
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


Document = dict[str, Any]

STATES = (
    "resolving", "refused", "failed", "absent", "preparing", "resident", "draining", "releasing",
    "retiring",
)  # fmt: skip


def state_of(name: KnownName, record: AdapterRecord | None) -> str:
    """Return where an adapter stands, in one word.

    resolving, refused (for good), failed (a later try may succeed), absent (known, not on
    the shards), preparing, resident, draining (must make room), releasing. What a name led
    to before is retiring.
    """
    if name.num_resolving:
        return "resolving"
    if record is None:
        if name.failure is None:
            return "absent"
        return "refused" if name.failure.reason.permanent else "failed"
    return shard_state_of(record)


def shard_state_of(record: AdapterRecord) -> str:
    """Return where an adapter stands on the shards, in one word."""
    return "draining" if record.drained_at is not None else record.state.value


def bytes_of(
    handle: AdapterHandle | None, content: AdapterContent | None, tiers: AdapterTiers
) -> dict[str, int]:
    """Return what an adapter takes in each tier."""
    parts = content.parts if content is not None else ()
    device = tiers.device.get(handle) if handle is not None else None
    return {
        "device": 0 if device is None else device[1],
        "host": sum(tiers.host.get(part.content_digest, 0) for part in parts),
        "disk": sum(tiers.disk.get(part.store_digest, 0) for part in parts),
    }


def name_document(
    name: KnownName,
    record: AdapterRecord | None,
    content: AdapterContent | None,
    tiers: AdapterTiers,
) -> Document:
    """Return a name with what it leads to."""
    fetched, failure = name.fetched, name.failure
    return {
        "adapter_id": name.ref.id,
        "adapter_source": name.ref.source,
        "revision": name.ref.revision,
        "version": None if fetched is None else fetched.version,
        "rank": None if fetched is None else fetched.max_rank,
        "state": state_of(name, record),
        "pinned": name.is_pinned and (record is None or record.is_pinned),
        **_use(record, content, tiers),
        "uses": name.num_uses,
        "last_used": name.last_used_at,
        "failure": None
        if failure is None
        else {"reason": failure.reason.value, "text": failure.text},
    }


def nameless_document(
    label: str,
    source: str,
    state: str,
    record: AdapterRecord,
    content: AdapterContent,
    tiers: AdapterTiers,
    *,
    num_uses: int,
    last_used_at: float | None,
) -> Document:
    """Return what no name leads to: a merge, or one that was replaced and is still in use."""
    return {
        "adapter_id": label,
        "adapter_source": source,
        "revision": None,
        "version": None,
        "rank": None,
        "state": state,
        "pinned": record.is_pinned,
        **_use(record, content, tiers),
        "uses": num_uses,
        "last_used": last_used_at,
        "failure": None,
    }


def _use(
    record: AdapterRecord | None, content: AdapterContent | None, tiers: AdapterTiers
) -> Document:
    handle = record.handle if record is not None else None
    return {
        "content_digest": None if content is None else content.key,
        "bytes": bytes_of(handle, content, tiers),
        "waiting": 0 if record is None else record.num_waiting,
        "running": 0 if record is None else record.num_running,
    }
