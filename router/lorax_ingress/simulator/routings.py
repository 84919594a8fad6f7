"""The routings that are compared: ours, and three that know less."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from random import Random
from typing import Protocol

from lorax_ingress.routing.preloads import Preload
from lorax_ingress.routing.rendezvous import hash_of, mixed
from lorax_ingress.routing.router import AffineRouter
from lorax_ingress.routing.values import ReplicaView, RouteRequest, RoutingSettings

ROUTINGS = ("affine", "random", "round_robin", "consistent")


class Routing(Protocol):
    """Chooses a replica, and is told what came of it."""

    # Whether it wants views of the replicas.
    has_views: bool

    def choose(self, request_id: str, request: RouteRequest, now: float) -> str:
        """Return where a request goes; it is sent there."""

    def see(self, view: ReplicaView) -> None:
        """Take a replica's view."""

    def take_preloads(self) -> Sequence[Preload]:
        """Return who is to load what before requests come."""

    def begins(self, request_id: str) -> None:
        """Its first token is there."""

    def ended(self, request_id: str, now: float) -> None:
        """A request is over."""


class _Blind:
    """A routing that is told nothing of replicas but their names."""

    has_views = False

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)

    def see(self, view: ReplicaView) -> None:
        """Nothing is made of it."""

    def take_preloads(self) -> Sequence[Preload]:
        """Nothing is loaded before a request comes."""
        return ()

    def begins(self, request_id: str) -> None:
        """Nothing is made of it."""

    def ended(self, request_id: str, now: float) -> None:
        """Nothing is made of it."""


class RandomRouting(_Blind):
    """Any replica."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        super().__init__(names)
        self._random = Random(seed)

    def choose(self, request_id: str, request: RouteRequest, now: float) -> str:
        """Draw one."""
        return self._random.choice(self._names)


class RoundRobin(_Blind):
    """One replica after the other."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._next = 0

    def choose(self, request_id: str, request: RouteRequest, now: float) -> str:
        """Take the next one."""
        self._next += 1
        return self._names[(self._next - 1) % len(self._names)]


class HashRing(_Blind):
    """Plain consistent hashing: an adapter's only replica is the next one on a ring.

    Args:
        names: the replicas.
        num_points: places of each replica on the ring.
    """

    def __init__(self, names: Sequence[str], num_points: int = 256) -> None:
        super().__init__(names)
        places = [(mixed(hash_of(f"{n}#{i}")), n) for n in names for i in range(num_points)]
        places.sort()
        self._places = [place for place, _ in places]
        self._owners = [name for _, name in places]

    def choose(self, request_id: str, request: RouteRequest, now: float) -> str:
        """Take the adapter's."""
        return self.owner(request.adapter or "")

    def owner(self, adapter: str) -> str:
        """Return an adapter's replica."""
        place = bisect(self._places, mixed(hash_of(adapter))) % len(self._places)
        return self._owners[place]


class AffineRouting:
    """The ingress's own router."""

    has_views = True

    def __init__(self, names: Iterable[str], seed: int, settings: RoutingSettings) -> None:
        random = Random(seed)
        self.router = AffineRouter(random.randrange, settings)
        self.reasons: dict[str, int] = {}

    def choose(self, request_id: str, request: RouteRequest, now: float) -> str:
        """Ask it, and tell it that this was done."""
        decision = self.router.route(request, now)
        if decision is None:
            raise RuntimeError("no replica takes requests; let each be seen before the first one")
        self.router.sent(request_id, request, decision.replica, now)
        if decision.preload_at is not None and request.adapter is not None:
            self.router.preloads_at(request.adapter, decision.preload_at, now)
        reason = decision.reason.value
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        return decision.replica

    def see(self, view: ReplicaView) -> None:
        """Hand it on."""
        self.router.see(view)

    def take_preloads(self) -> Sequence[Preload]:
        """Hand on what it says."""
        return self.router.take_preloads()

    def begins(self, request_id: str) -> None:
        """Hand it on."""
        self.router.begins(request_id)

    def ended(self, request_id: str, now: float) -> None:
        """Hand it on."""
        self.router.ended(request_id, now)


def make_routing(
    name: str, replicas: Sequence[str], seed: int, settings: RoutingSettings | None = None
) -> Routing:
    """Return a routing by its name, one of ROUTINGS."""
    if name == "affine":
        return AffineRouting(replicas, seed, settings or RoutingSettings())
    if name == "random":
        return RandomRouting(replicas, seed)
    if name == "round_robin":
        return RoundRobin(replicas)
    if name == "consistent":
        return HashRing(replicas)
    raise ValueError(f"there is no routing {name!r}; known are {', '.join(ROUTINGS)}")
