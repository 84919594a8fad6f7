"""What an ingress is told of a core: what it serves, and how much it has to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from lorax_contract.config import RouterConfig
from lorax_contract.step import AdapterHandle
from lorax_router.core.adapters.record import AdapterState
from lorax_router.core.adapters.table import AdapterRecord
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.engine.port import EngineStats
from lorax_router.service.info import ServerInfo


class CoreFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while a core serves, by a RouterConfig's names where it has one."""

    model_id: str
    served_model_names: list[str]
    model_device_type: str
    max_total_tokens: int
    max_body_bytes: int
    default_adapter_source: str
    # Why no adapters are served; None: they are.
    adapter_refusal: str | None


class CoreLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How much a core has to do. Adapters have the names that requests call them by."""

    is_accepting: bool
    num_slots: int
    # On the shards, or on their way.
    resident: list[str]
    num_running: int
    num_queued: int
    # Prompts and the most that may follow, of those that were never admitted.
    num_queued_tokens: int
    # Share of the KV blocks that requests hold.
    kv_in_use: float
    # What each tenant got of it so far, as Scheduler.service_here has it.
    served: dict[str, float] = {}


def facts_of(config: RouterConfig, info: ServerInfo, selections: SelectionPolicy) -> CoreFacts:
    """Return what does not change of a router while it serves."""
    return CoreFacts(
        model_id=config.model_id,
        served_model_names=[*config.served_model_names],
        model_device_type=info.model_device_type,
        max_total_tokens=info.max_total_tokens,
        max_body_bytes=config.max_body_bytes,
        default_adapter_source=config.default_adapter_source,
        adapter_refusal=selections.refusal,
    )


class LoadedEngine(Protocol):
    """What is asked how much there is to do."""

    @property
    def has_shards(self) -> bool:
        """Whether there are shards; while others are waited for, requests wait, too."""

    def stats(self) -> EngineStats:
        """Return a snapshot."""

    def adapters_in_play(self) -> list[AdapterRecord]:
        """Return the adapters that are on the shards, come, go or are waited for."""

    def service_here(self) -> Mapping[str, float]:
        """Return what each tenant got so far."""


class NamedAdapters(Protocol):
    """What knows adapters by their names."""

    def labels(self, handles: Iterable[AdapterHandle]) -> list[str]:
        """Return all that requests may call some adapters, private ones included."""


def load_of(
    engine: LoadedEngine, adapters: NamedAdapters, *, is_open: bool, num_slots: int
) -> CoreLoad:
    """Return how much a core has to do now."""
    stats = engine.stats()
    present = [
        record.handle for record in engine.adapters_in_play()
        if record.state in (AdapterState.RESIDENT, AdapterState.PREPARING)
    ]  # fmt: skip
    depths, labels = stats.queue_depths.values(), adapters.labels(present)
    return CoreLoad(
        is_accepting=is_open and engine.has_shards,
        # One that has several names takes one slot.
        num_slots=num_slots + len(labels) - len(present),
        resident=labels,
        num_running=stats.num_running,
        num_queued=stats.num_waiting,
        num_queued_tokens=sum(each.num_tokens for each in depths),
        kv_in_use=1.0 - stats.num_free_blocks / max(stats.num_blocks, 1),
        served={**engine.service_here()},
    )
