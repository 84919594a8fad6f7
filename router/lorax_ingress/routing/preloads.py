"""Adapters that replicas are told to load before requests for them come there."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from lorax_ingress.routing.book import ReplicaBook


class Preload(NamedTuple):
    """A replica that is to load an adapter."""

    replica: str
    adapter: str


class Preloads:
    """Remembers which adapters may be preloaded, and tells replicas to load them.

    Args:
        patience_s: so long requests go elsewhere, for a replica to say that it has what it was told.
        max_known: adapters that may be preloaded and are remembered; those asked for last stay.
    """

    def __init__(self, patience_s: float, max_known: int) -> None:
        self._patience_s, self._max_known = patience_s, max_known
        self._known: OrderedDict[str, None] = OrderedDict()
        self._orders: list[Preload] = []

    def allow(self, adapter: str) -> None:
        """A request that anyone may send got an answer of an adapter."""
        self._known[adapter] = None
        self._known.move_to_end(adapter)
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)

    def allows(self, adapter: str) -> bool:
        """Whether an adapter may be loaded with nobody asking for it."""
        return adapter in self._known

    def tell(self, adapter: str, book: ReplicaBook, now: float) -> None:
        """A replica is to load an adapter; telling it twice does nothing."""
        if adapter not in book.told:
            book.told[adapter] = now
            self._orders.append(Preload(book.view.name, adapter))

    def take(self) -> list[Preload]:
        """Return what is to be told and was not returned yet."""
        orders, self._orders = self._orders, []
        return orders

    def is_awaited(self, adapter: str, book: ReplicaBook, now: float) -> bool:
        """Whether requests should go elsewhere until a replica has an adapter, told or not yet."""
        return now - book.told.get(adapter, now) <= self._patience_s

    def see(self, book: ReplicaBook) -> list[str]:
        """Take a replica's new view; return the adapters that it was told to load and has now."""
        told, view = book.told, book.view
        arrived = [key for key in told if key in view.resident]
        # Until they are twice as old the next request goes there; of most there is none.
        old = [key for key, at in told.items() if view.taken_at - at > 2.0 * self._patience_s]
        for key in {*arrived, *old}:
            del told[key]
        return arrived

    def forget(self, replica: str) -> None:
        """A replica is gone."""
        self._orders = [each for each in self._orders if each.replica != replica]
