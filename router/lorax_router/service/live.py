"""What the engine does right now, as a person may look at it: whose rows, which blocks, which adapters.

An admin sees all of it, a tenant its own requests and the sums of all. Adapters have the names that
the caller may know; a private one has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from lorax_contract.step import BASE_ADAPTER, AdapterHandle
from lorax_router.core.adapters.table import AdapterCapacity, AdapterRecord
from lorax_router.core.groups import RequestGroup
from lorax_router.service.adapters.listing import shard_state_of
from lorax_router.service.callers import Caller
from lorax_router.service.engine.port import EngineStats

Document = dict[str, Any]

# Groups and adapters that are named; the sums are of all.
MOST_NAMED = 200


class WatchedEngine(Protocol):
    """What is looked at."""

    def stats(self) -> EngineStats:
        """Return a snapshot."""

    def groups(self) -> list[RequestGroup]:
        """Return who runs and who waits, by adapter and tenant."""

    def adapters_in_play(self) -> list[AdapterRecord]:
        """Return the adapters that are on the shards, come, go or are waited for."""

    def adapter_capacity(self) -> AdapterCapacity:
        """Return how much room there is for adapters, and how much of it is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedFacts:
    """What does not change while a server runs."""

    # What the base is called.
    model: str
    max_rows: int
    # Tokens in a KV block.
    block_size: int
    # Where adapters come from whose names say nothing of it.
    default_source: str
    # Why no adapters are served; None: they are.
    adapter_refusal: str | None = None


class LiveView:
    """Makes documents of the present.

    Args:
        engine: what is looked at.
        facts: what does not change.
        name_of: what a caller may call an adapter; None: nothing.
        num_generated: how many tokens were generated so far.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: WatchedEngine,
        facts: ServedFacts,
        name_of: Callable[[AdapterHandle, Caller], str | None],
        num_generated: Callable[[], int],
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._engine = engine
        self._facts = facts
        self._name_of = name_of
        self._num_generated = num_generated
        self._clock = clock
        self._begun_at = clock()

    def document(self, caller: Caller) -> Document:
        """Return what a caller may see; seconds and counts are since the server began."""
        stats, facts = self._engine.stats(), self._facts
        return {
            "model": facts.model,
            "caller": _rights(caller),
            "seconds": round(self._clock() - self._begun_at, 4),
            "steps": stats.num_steps,
            "generated_tokens": self._num_generated(),
            "prompt_tokens": stats.num_entered_tokens,
            "cached_tokens": stats.num_cached_tokens,
            "rows": {
                "running": stats.num_running,
                "waiting": stats.num_waiting,
                "most": facts.max_rows,
                "preempted": stats.num_preemptions,
            },
            "kv": _blocks(stats, facts.block_size),
            "groups": self._groups(caller),
            "adapters": self._adapters(caller),
        }

    def _groups(self, caller: Caller) -> list[Document]:
        """Return rows by adapter and tenant, those that the caller may not see in one sum."""
        groups = self._engine.groups()
        shown = [each for each in groups if _is_seen(each, caller)]
        rest = [each for each in groups if not _is_seen(each, caller)] + shown[MOST_NAMED:]
        documents = [
            {
                "adapter": self._name(each.adapter, caller),
                "is_base": each.adapter == BASE_ADAPTER,
                "tenant": each.tenant or None,
                "is_others": False,
                **_sums([each]),
            }
            for each in shown[:MOST_NAMED]
        ]
        if rest:
            others = {"adapter": None, "is_base": False, "tenant": None, "is_others": True}
            documents.append({**others, **_sums(rest)})
        return documents

    def _adapters(self, caller: Caller) -> Document | None:
        """Return which adapters are where; None: none are served."""
        if self._facts.adapter_refusal is not None:
            return None
        capacity, records = self._engine.adapter_capacity(), self._engine.adapters_in_play()
        states: dict[str, int] = {}
        for record in records:
            states[shard_state_of(record)] = states.get(shard_state_of(record), 0) + 1
        named = ((self._name_of(record.handle, caller), record) for record in records[:MOST_NAMED])
        return {
            "default_source": self._facts.default_source,
            "slots": capacity.max_resident,
            "slots_held": capacity.num_held,
            "bytes": capacity.max_bytes,
            "bytes_held": capacity.bytes_held,
            "states": states,
            "in_play": [
                {
                    "adapter": name,
                    "state": shard_state_of(record),
                    "pinned": record.is_pinned,
                    "bytes": record.nbytes,
                }
                for name, record in named
            ],
        }

    def _name(self, handle: AdapterHandle, caller: Caller) -> str | None:
        return self._facts.model if handle == BASE_ADAPTER else self._name_of(handle, caller)


def _is_seen(group: RequestGroup, caller: Caller) -> bool:
    """Whether a caller may know whose requests these are."""
    return caller.is_admin or not caller.has_key or group.tenant == caller.tenant


def _sums(groups: Sequence[RequestGroup]) -> Document:
    return {
        "running": sum(each.num_running for each in groups),
        "waiting": sum(each.num_waiting for each in groups),
        "blocks": sum(each.num_blocks for each in groups),
        "tokens": sum(each.num_tokens for each in groups),
    }


def _rights(caller: Caller) -> Document:
    """Return who the caller is, and what the page may offer them."""
    return {
        "has_key": caller.has_key,
        "tenant": caller.tenant or None,
        "may_manage": caller.is_admin,
        "may_pin": caller.is_admin or bool(caller.quotas.pins),
    }


def _blocks(stats: EngineStats, block_size: int) -> Document:
    """Return what the KV pool's blocks are used for; those in the cache may be had."""
    return {
        "blocks": stats.num_blocks,
        "used": stats.num_blocks - stats.num_free_blocks,
        "cached": stats.num_cached_blocks,
        "tokens_each": block_size,
    }
