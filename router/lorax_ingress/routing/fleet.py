"""All replicas: who has which adapter, who takes requests, how much work there is."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_ingress.routing.book import ReplicaBook, SentRequest
from lorax_ingress.routing.rendezvous import Rendezvous
from lorax_ingress.routing.values import ReplicaView

# KV blocks in use from which on a replica takes a request only if none has less.
FULL_KV = 0.95


class FleetBooks:
    """The books of all replicas, and what is looked up in them by adapter.

    Args:
        prompt_unit: tokens of queued prompts that are as much work as a request.
        max_ranked: adapters whose homes are remembered.
    """

    def __init__(self, prompt_unit: int, max_ranked: int) -> None:
        self._prompt_unit = prompt_unit
        self.books: dict[str, ReplicaBook] = {}
        # Those that take new requests, by name.
        self.open: dict[str, ReplicaBook] = {}
        self._homes = Rendezvous(max_ranked)
        # Names in the order in which they came: sets would differ from process to process.
        self._holders: dict[str, dict[str, None]] = {}
        self._hosts: dict[str, dict[str, None]] = {}
        self._work = self._capacity = 0.0

    # --- what is seen -------------------------------------------------------------

    def see(self, view: ReplicaView) -> None:
        """Take a replica's view; one older than the last is passed over."""
        name = view.name
        book = self.books.get(name)
        if book is None:
            book = self.books[name] = ReplicaBook(_nothing(view))
            self._homes.use({each.view.name: each.view.capacity for each in self.books.values()})
        elif view.taken_at < book.view.taken_at:
            return
        before = book.view
        self._leave(name)
        gone = book.see(view, self._prompt_unit)
        _change(self._hosts, name, before.hosted - view.hosted, view.hosted - before.hosted)
        lost = [key for key in {*gone, *(before.resident - view.resident)} if not book.holds(key)]
        _change(self._holders, name, lost, view.resident - before.resident)
        if view.capacity != before.capacity:
            self._homes.use({each.view.name: each.view.capacity for each in self.books.values()})
        self._enter(name, book)

    def forget(self, name: str) -> list[str]:
        """A replica is gone; return the requests that were on it."""
        book = self.books.get(name)
        if book is None:
            return []
        self._leave(name)
        del self.books[name]
        _change(self._hosts, name, book.view.hosted, ())
        _change(self._holders, name, {*book.view.resident, *book.touched}, ())
        self._homes.use({each.view.name: each.view.capacity for each in self.books.values()})
        return list(book.sent)

    def _enter(self, name: str, book: ReplicaBook) -> None:
        if book.view.is_accepting:
            self.open[name] = book
            self._work += book.work
            self._capacity += book.view.capacity

    def _leave(self, name: str) -> None:
        book = self.open.pop(name, None)
        if book is not None:
            self._work -= book.work
            self._capacity -= book.view.capacity

    # --- what is sent -------------------------------------------------------------

    def add(self, request_id: str, request: SentRequest) -> None:
        """A request was sent."""
        book = self.books[request.replica]
        before = book.work
        book.add(request_id, request)
        self._changed(request.replica, book.work - before)
        if request.adapter is not None:
            self._holders.setdefault(request.adapter, {})[request.replica] = None

    def begins(self, request_id: str, replica: str) -> None:
        """Its first token is there."""
        book = self.books[replica]
        before = book.work
        book.begins(request_id)
        self._changed(replica, book.work - before)

    def remove(self, request_id: str, replica: str, now: float) -> None:
        """A request is over."""
        book = self.books[replica]
        before = book.work
        book.remove(request_id, now)
        self._changed(replica, book.work - before)

    def _changed(self, name: str, by: float) -> None:
        if name in self.open:
            self._work += by

    # --- what is asked ------------------------------------------------------------

    @property
    def mean(self) -> float:
        """Work for each unit of capacity, of those that take requests."""
        return self._work / self._capacity if self._capacity > 0 else 0.0

    @property
    def num_slots(self) -> int:
        """Slots for adapters of those that take requests: O(replicas)."""
        return sum(book.view.num_slots for book in self.open.values())

    def mean_with(self, work: float) -> float:
        """Return the same once so much more work is sent."""
        return (self._work + work) / self._capacity if self._capacity > 0 else 0.0

    def holders(self, adapter: str) -> list[str]:
        """Return those that take requests and have an adapter on the device, or soon."""
        return [name for name in self._holders.get(adapter, ()) if name in self.open]

    def hosts(self, adapter: str) -> list[str]:
        """Return those that take requests and have an adapter in host memory."""
        return [name for name in self._hosts.get(adapter, ()) if name in self.open]

    def ranked(self, adapter: str) -> tuple[str, ...]:
        """Return all replicas, the first home of an adapter first; some may take no requests."""
        return self._homes.ranked(adapter)

    def load(self, name: str) -> float:
        """Return a replica's work by its capacity."""
        book = self.open[name]
        return book.work / book.view.capacity

    def check(self) -> None:
        """Raise AssertionError where a sum or an index is not what the books say, for tests."""
        work = sum(each.work for each in self.open.values())
        if abs(work - self._work) > 1e-6 * max(work, 1.0):
            raise AssertionError(f"the work adds up to {work}, and {self._work} is booked")
        for name, book in self.books.items():
            held = {key for key, names in self._holders.items() if name in names}
            if held != {*book.view.resident, *book.touched}:
                raise AssertionError(f"the index of {name} is not what it holds")


def _nothing(view: ReplicaView) -> ReplicaView:
    """Return the view before the first one: nothing is known to be there."""
    return ReplicaView(
        name=view.name, taken_at=view.taken_at, is_accepting=False, capacity=view.capacity
    )


def _change(
    index: dict[str, dict[str, None]], name: str, lost: Iterable[str], got: Iterable[str]
) -> None:
    for key in lost:
        names = index.get(key)
        if names is not None:
            names.pop(name, None)
            if not names:
                del index[key]
    for key in got:
        index.setdefault(key, {})[name] = None
