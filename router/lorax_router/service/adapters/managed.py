"""What was managed by hand, as servers tell it each other: names, pins, loads, without tokens.

A register of which the last writer wins, for each thing that can be done about an adapter. Changes
have a total order, so whoever was told the same ones knows the same, whatever the order in which
they came and however often: that is what a single server would know that had done all of them, one
after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from heapq import nsmallest
from operator import attrgetter
from typing import NamedTuple

from lorax_contract.adapters import AdapterRef

# Adapters that were loaded by hand and are neither pinned nor named: the latest are kept.
MAX_LOADS = 256
# The same of what takes back, and of what was asked for anew.
MAX_PAST = 4096
# Seconds by which what is done is later than what is known, whatever clocks say.
STEP_S = 0.001


class ManagedKind(Enum):
    """What was done."""

    # A name of the operator's choosing stands for an adapter.
    NAME = "name"
    PIN = "pin"
    LOAD = "load"
    # Its source was asked anew. That holds for ever.
    RELOAD = "reload"
    # Takes back a tenant's pins that are earlier; the operator's takes back everybody's.
    UNPIN = "unpin"
    # Takes back all that is earlier: loads, pins, and the name if it is one.
    UNLOAD = "unload"


_HOLDING = (ManagedKind.NAME, ManagedKind.PIN, ManagedKind.LOAD)


class Stamp(NamedTuple):
    """When something was done, and by whom: of two the larger one is the later one."""

    # Unix time, later than all that was known to whoever did it.
    at: float
    # No two ingresses or servers are called the same.
    by: str = ""


# The stamp of the call that a task carries out, where an ingress gave it one: the same at all
# replicas that the call is sent to. None: the call came to this server alone.
call_stamp: ContextVar[Stamp | None] = ContextVar("call_stamp", default=None)

# What a change is about.
ManagedKey = tuple[ManagedKind, AdapterRef, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedChange:
    """One thing that was done by hand."""

    kind: ManagedKind
    # The adapter; of a name, the name among all names.
    ref: AdapterRef
    stamp: Stamp
    # Who keeps what is pinned; the empty one is the operator.
    tenant: str = ""
    # What a name stands for.
    target: AdapterRef | None = None
    # Whether its adapter took a token, which is not told.
    is_private: bool = False

    @property
    def key(self) -> ManagedKey:
        """What it is about."""
        return self.kind, self.ref, self.tenant

    @property
    def rank(self) -> tuple[Stamp, str, bool]:
        """Its place among all changes about the same thing: no two have the same one."""
        return self.stamp, str(self.target), self.is_private

    @property
    def order(self) -> tuple[Stamp, str, str]:
        """Its place among all that is known: the same at everybody who knows the same."""
        return self.stamp, self.kind.value, str(self.ref)

    def takes_back(self, other: ManagedChange) -> bool:
        """Whether another change about the same adapter is over with this one."""
        if other.stamp > self.stamp:
            return False
        if self.kind is ManagedKind.UNPIN:
            return other.kind is ManagedKind.PIN and self.tenant in ("", other.tenant)
        return self.kind is ManagedKind.UNLOAD and other.kind in _HOLDING


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedKnown:
    """What one server knows."""

    changes: list[ManagedChange]
    # A Unix time that is later than all that it knows.
    clock: float


@dataclass(slots=True)
class Taken:
    """What is new of what was told."""

    # Those that hold, or take back.
    news: list[ManagedChange] = field(default_factory=list)
    # What held until now.
    over: list[ManagedChange] = field(default_factory=list)
    # About what something changed.
    refs: set[AdapterRef] = field(default_factory=set)


class ManagedRecord:
    """The last change about everything, without those that are taken back.

    Args:
        max_loads: so many loads at most, the latest.
        max_past: so many at most of what takes back or was asked for anew.
    """

    def __init__(self, max_loads: int = MAX_LOADS, max_past: int = MAX_PAST) -> None:
        self._bounds = {
            (ManagedKind.LOAD,): max_loads,
            (ManagedKind.RELOAD, ManagedKind.UNPIN, ManagedKind.UNLOAD): max_past,
        }
        self._about: dict[AdapterRef, dict[ManagedKey, ManagedChange]] = {}
        self._num: Counter[ManagedKind] = Counter()
        # The time of the latest that was ever told; of all that is known a number, the same for
        # the same, however it came.
        self.latest = 0.0
        self.digest = 0

    def all(self, since: float = 0.0) -> list[ManagedChange]:
        """Return all that is known and was done since a Unix time, the earliest first."""
        found = (each for each in self._each() if each.stamp.at >= since)
        return sorted(found, key=_order)

    def _each(self) -> Iterator[ManagedChange]:
        return (each for about in self._about.values() for each in about.values())

    def about(self, ref: AdapterRef) -> list[ManagedChange]:
        """Return what is known of one adapter or name."""
        return [*self._about.get(ref, {}).values()]

    def take(self, changes: Iterable[ManagedChange]) -> Taken:
        """Take over what was done, here or elsewhere; returns what of it is new."""
        taken = Taken()
        for each in changes:
            self._put(each, taken)
        for kinds, most in self._bounds.items():
            self._bound(kinds, most, taken)
        # Neither what went with the same message nor what is too long ago to be kept.
        taken.news = [each for each in taken.news if self.is_last(each)]
        return taken

    def is_last(self, change: ManagedChange) -> bool:
        """Whether a change is the last about its thing, and not taken back."""
        return self._about.get(change.ref, {}).get(change.key) == change

    def is_taken_back(self, change: ManagedChange) -> bool:
        """Whether a change is over with a later one."""
        return any(each.takes_back(change) for each in self.about(change.ref))

    def holds(self, kind: ManagedKind, ref: AdapterRef, tenant: str = "") -> bool:
        """Whether an adapter is named, pinned by a tenant, or loaded."""
        return (kind, ref, tenant) in self._about.get(ref, {})

    def is_wanted(self, ref: AdapterRef) -> bool:
        """Whether an adapter is named, pinned or loaded."""
        return any(each.kind in _HOLDING for each in self.about(ref))

    def _put(self, change: ManagedChange, taken: Taken) -> None:
        self.latest = max(self.latest, change.stamp.at)
        about = self._about.get(change.ref, {})
        former = about.get(change.key)
        if (former is not None and former.rank >= change.rank) or self.is_taken_back(change):
            return
        if former is not None:
            self._drop(former)
        for each in [each for each in about.values() if change.takes_back(each)]:
            self._drop(each)
            taken.over.append(each)
        self._about.setdefault(change.ref, {})[change.key] = change
        self._num[change.kind] += 1
        self.digest ^= _digest(change)
        taken.news.append(change)
        taken.refs.add(change.ref)

    def _bound(self, kinds: tuple[ManagedKind, ...], most: int, taken: Taken) -> None:
        num = sum(self._num[kind] for kind in kinds) - most
        if num > 0:
            bounded = (each for each in self._each() if each.kind in kinds)
            for each in nsmallest(num, bounded, key=_order):
                self._drop(each)
                taken.refs.add(each.ref)

    def _drop(self, change: ManagedChange) -> None:
        about = self._about[change.ref]
        del about[change.key]
        if not about:
            del self._about[change.ref]
        self._num[change.kind] -= 1
        self.digest ^= _digest(change)


_order = attrgetter("order")


def _digest(change: ManagedChange) -> int:
    said = (*change.key, *change.rank)
    text = "\0".join(each.value if isinstance(each, Enum) else str(each) for each in said)
    # One that every encoding of integers takes.
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=7).digest())
