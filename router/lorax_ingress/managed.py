"""What was managed by hand through an ingress, kept for replicas that are attached later."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeVar

from lorax_contract.adapters import AdapterRef
from lorax_router.service.adapters.managed import ManagedAdapters, ManagedName, TakenBack
from lorax_router.service.adapters.registry import Pin

_Key = TypeVar("_Key", Pin, AdapterRef)
# Of each kind; what was told first goes first.
_MAX_KEPT = 4096


class ManagedBook:
    """Names, pins and loads that all replicas are to have; no tokens.

    A replica that is attached tells what it has, and is told the rest. What a call through this
    ingress took back is not believed of replicas that were away meanwhile: they let it go.

    Args:
        max_kept: of each kind, at most so many.
    """

    def __init__(self, max_kept: int = _MAX_KEPT) -> None:
        self._max_kept = max_kept
        self._names: OrderedDict[str, ManagedName] = OrderedDict()
        self._pins: OrderedDict[Pin, None] = OrderedDict()
        self._loads: OrderedDict[AdapterRef, None] = OrderedDict()
        # What was taken back; a name that was given before that. Since when each is gone, counted.
        self._gone: OrderedDict[str | Pin | AdapterRef, float] = OrderedDict()
        self._gone_since: dict[str | Pin | AdapterRef, int] = {}
        self.num_changes = 0
        # How many changes each replica knows of that is away.
        self._left_at: OrderedDict[str, int] = OrderedDict()

    def all(self) -> ManagedAdapters:
        """Return what a replica is to have."""
        return ManagedAdapters(tuple(self._names.values()), tuple(self._pins), tuple(self._loads))

    def left(self, replica: str) -> None:
        """A replica is gone: of what is taken back from now on it knows nothing."""
        self._left_at[replica] = self.num_changes
        self._left_at.move_to_end(replica)
        _shorten(self._left_at, self._max_kept)

    def gone_for(self, replica: str) -> TakenBack:
        """Return what was taken back while a replica was away; all of it, if it was never here."""
        since = self._left_at.get(replica, 0)
        gone = {each: at for each, at in self._gone.items() if self._gone_since[each] > since}
        return TakenBack(
            {each: at for each, at in gone.items() if isinstance(each, str)},
            tuple(each for each in gone if isinstance(each, Pin)),
            tuple(each for each in gone if isinstance(each, AdapterRef)),
        )

    def told(self, managed: ManagedAdapters) -> None:
        """A replica that is attached has so much; the younger of two names is believed."""
        for name in managed.names:
            known = self._names.get(name.name)
            is_gone = self._gone.get(name.name, -1.0) >= name.created_at
            if not is_gone and (known is None or known.created_at < name.created_at):
                self._names[name.name] = name
        self._pins |= dict.fromkeys(pin for pin in managed.pins if pin not in self._gone)
        self._loads |= dict.fromkeys(ref for ref in managed.loads if ref not in self._gone)
        self._bound()

    def changed(self, before: ManagedAdapters, after: ManagedAdapters) -> bool:
        """A call changed what a replica has; returns whether there is more than before."""
        self.num_changes += 1
        gone_before = dict(self._gone)
        names, former = _by_name(after), _by_name(before)
        for name in former.keys() - names.keys():
            self._names.pop(name, None)
            self._gone[name] = former[name].created_at
        added = {each for each in names.values() if former.get(each.name) != each}
        for each in added:
            self._names[each.name] = each
        new_pins = _changed(self._pins, self._gone, before.pins, after.pins)
        new_loads = _changed(self._loads, self._gone, before.loads, after.loads)
        for item, created_at in self._gone.items():
            if gone_before.get(item) != created_at:
                self._gone_since[item] = self.num_changes
        self._bound()
        return bool(added) or new_pins or new_loads

    def _bound(self) -> None:
        for each in (self._names, self._pins, self._loads, self._gone):
            _shorten(each, self._max_kept)
        self._gone_since = {each: self._gone_since[each] for each in self._gone}


def _shorten(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


def _by_name(managed: ManagedAdapters) -> dict[str, ManagedName]:
    return {each.name: each for each in managed.names}


def _changed(
    kept: OrderedDict[_Key, None],
    gone: OrderedDict[Any, float],
    before: Iterable[_Key],
    after: Iterable[_Key],
) -> bool:
    """Take over what came and what went; returns whether anything came."""
    had, has = dict.fromkeys(before), dict.fromkeys(after)
    for each in had:
        if each not in has:
            kept.pop(each, None)
            gone[each] = 0.0
    added = [each for each in has if each not in had]
    for each in added:
        gone.pop(each, None)
        kept[each] = None
    return bool(added)
