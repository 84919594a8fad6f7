"""The virtual clock of a fleet: arrivals, each replica's steps and adapters, views on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import numpy as np

from lorax_contract.step import AdapterHandle
from lorax_ingress.routing.shares import ServiceExchange
from lorax_ingress.routing.values import ReplicaView, RouteRequest
from lorax_ingress.simulator.routings import Routing
from lorax_ingress.simulator.tiers import FleetStore, TieredLane
from lorax_router.core.adapters.record import AdapterState
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.fronts.elsewhere import ServiceElsewhere
from lorax_router.simulator.driver import StandstillError, TermsOfTrace, request_of
from lorax_router.simulator.replica import SimulatedReplica
from lorax_router.simulator.server import SimulatedServer
from lorax_router.simulator.service import MAX_WINDOWS, ServiceMeter
from lorax_router.simulator.shard import SimulatedShard
from lorax_router.simulator.trace import Floats, Trace

# How often turns of adapters are looked at while no step runs, as the engine loop does.
_IDLE_TICK_S = 0.5
_MAX_IDLE_TICKS = 100_000
_HERE = (AdapterState.RESIDENT, AdapterState.PREPARING)


@dataclass(slots=True, kw_only=True)
class FleetRun:
    """What came of a workload under one routing."""

    trace: Trace
    num_replicas: int
    first_token_at: Floats
    ended_at: Floats
    # By replica: adapters that were brought to the device, and those that came from the store.
    loads: list[int]
    fetches: list[int]
    # Seconds that the device of each was at work.
    busy: list[float]
    num_steps: int
    end: float


class FleetSimulation:
    """One run of equal replicas. Time comes from the workload, the cost model and the links.

    Args:
        trace: the requests.
        server: what each replica is.
        routing: decides where they go.
        names: of the replicas.
        gossip_s: how often each tells its state, and how long that is on its way: what the routing
            knows is between one and two of these old.
        store: where adapters come from.
        policy: the schedulers'.
        meter: counts service; one that compares nobody if absent.
        is_fair: whether replicas tell each other, by the same way as their views, what they gave
            each tenant.
        joins_at: when replicas join that are not there from the first.
    """

    def __init__(
        self,
        trace: Trace,
        server: SimulatedServer,
        routing: Routing,
        names: list[str],
        *,
        gossip_s: float = 1.0,
        store: FleetStore | None = None,
        policy: str = "fair",
        meter: ServiceMeter | None = None,
        is_fair: bool = True,
        joins_at: Mapping[str, float] | None = None,
    ) -> None:
        self._trace, self._server, self._routing = trace, server, routing
        self._names, self._gossip_s = names, gossip_s
        self._joins_at = joins_at or {}
        self._handles = {name: AdapterHandle(i) for i, name in enumerate(trace.adapter_names)}
        store = store if store is not None else FleetStore()
        window = max(float(trace.times[-1]), 1.0) / MAX_WINDOWS
        self._meter = meter or ServiceMeter(trace.client_weights, [], window)
        self._shard = SimulatedShard(trace, server)
        self.lanes: list[TieredLane] = []
        self.replicas = [self._new_replica(policy, store) for _ in names]
        self._place = {name: place for place, name in enumerate(names)}
        self._terms = TermsOfTrace(trace)
        self._clients = [int(each) for each in trace.clients]
        self._adapters = [int(each) for each in trace.adapters]
        self._times = [float(each) for each in trace.times]
        self._num_left = len(trace)
        # What each replica was told to load and has not begun to.
        self._to_load: list[deque[AdapterHandle]] = [deque() for _ in names]
        # When each replica is to be looked at; entries of the heap that say otherwise are void.
        self._due = [inf] * len(names)
        self._heap: list[tuple[float, int]] = []
        # Views on their way, the first to come first.
        self._views: list[tuple[float, int, int, ReplicaView | None]] = []
        self._num_told = 0
        self._exchange = ServiceExchange() if is_fair else None
        # What each replica had given when its latest view was taken.
        self._given: list[Mapping[str, float]] = [{} for _ in names]
        self._tellers = [
            ServiceElsewhere(each.scheduler.served_elsewhere).teller() for each in self.replicas
        ]
        self._num_idle = 0
        self.now = 0.0

    def _new_replica(self, policy: str, store: FleetStore) -> SimulatedReplica:
        server = self._server
        table = AdapterTable(
            max_resident=server.max_adapters,
            max_bytes=server.adapter_pool_bytes,
            cycle_time_s=server.cycle_time_s,
        )
        lane = TieredLane(server, table, store)
        self.lanes.append(lane)
        return SimulatedReplica(server, policy, table, self._shard, self._meter, loads=lane)

    def run(self) -> FleetRun:
        """Serve all requests."""
        for place, name in enumerate(self._names):
            if self._exchange is not None:
                self._exchange.join(name)
            if (joins_at := self._joins_at.get(name)) is not None:
                self._plan_view(joins_at, place, None)
                continue
            self._routing.see(self._view(place))
            if self._routing.has_views:
                offset = self._gossip_s * (place + 1) / len(self._names)
                self._plan_view(offset, place, None)
        arrival = 0
        times = [*self._times, inf]
        while self._num_left:
            while self._heap and self._heap[0][0] != self._due[self._heap[0][1]]:
                heappop(self._heap)
            due = self._heap[0][0] if self._heap else inf
            seen = self._views[0][0] if self._views else inf
            self.now = min(times[arrival], due, seen)
            if self.now == seen:
                self._tell()
            elif self.now == times[arrival]:
                self._submit(arrival)
                arrival += 1
            else:
                self._advance(heappop(self._heap)[1])
        self._meter.finish()
        return self._result()

    # --- events -------------------------------------------------------------------

    def _tell(self) -> None:
        """A view is taken and sent on its way, or comes."""
        _, _, place, view = heappop(self._views)
        if view is not None:
            self._routing.see(view)
            self._preload()
            self._share(place)
            return
        self._plan_view(self.now + self._gossip_s, place, self._view(place))
        self._plan_view(self.now + self._gossip_s, place, None)

    def _preload(self) -> None:
        """Tell replicas what they are to load."""
        for name, adapter in self._routing.take_preloads():
            place = self._place[name]
            self._to_load[place].append(self._handles[adapter])
            self._load_next(place)

    def _load_next(self, place: int) -> None:
        """Have a replica that loads nothing load what is next, if there is a free slot."""
        table, waiting = self.replicas[place].table, self._to_load[place]
        if not waiting or any(each.state is not AdapterState.RESIDENT for each in table.in_play()):
            return
        handle = waiting.popleft()
        self._know(place, handle)
        capacity = table.capacity()
        if capacity.num_held < capacity.max_resident:
            table.want(handle, self.now)
            self._plan(place)

    def _know(self, place: int, handle: AdapterHandle) -> None:
        table = self.replicas[place].table
        if handle not in table:
            rank = self._trace.adapter_ranks[handle]
            table.add(handle, rank * self._server.bytes_per_rank, rank=rank)

    def _share(self, place: int) -> None:
        """Tell what this replica has given, and it what others have; no younger than a view."""
        if self._exchange is None:
            return
        name = self._names[place]
        self._exchange.report(name, self._given[place])
        self._given[place] = self.replicas[place].scheduler.service_here()
        self._tellers[place].tell(self._exchange.elsewhere(name))

    def _plan_view(self, time: float, place: int, view: ReplicaView | None) -> None:
        self._num_told += 1
        heappush(self._views, (time, self._num_told, place, view))

    def _view(self, place: int) -> ReplicaView:
        replica, names = self.replicas[place], self._trace.adapter_names
        stats = replica.scheduler.stats()
        depths = stats.queue_depths.values()
        return ReplicaView(
            name=self._names[place],
            taken_at=self.now,
            num_slots=self._server.max_adapters,
            resident=frozenset(
                [names[each.handle] for each in replica.table.in_play() if each.state in _HERE]
            ),
            hosted=frozenset([names[each] for each in self.lanes[place].hosted]),
            num_running=stats.num_running,
            num_queued=stats.num_waiting,
            num_queued_tokens=sum(each.num_tokens for each in depths),
            kv_in_use=1.0 - stats.num_free_blocks / stats.num_blocks,
        )

    def _submit(self, index: int) -> None:
        adapter = self._adapters[index]
        request = RouteRequest(
            adapter=self._trace.adapter_names[adapter] if adapter else None,
            num_prompt_tokens=int(self._trace.prompts[index]),
            can_preload=adapter > 0,
        )
        place = self._place[self._routing.choose(str(index), request, self.now)]
        replica = self.replicas[place]
        if adapter:
            self._know(place, AdapterHandle(adapter))
        self._preload()
        spec = request_of(self._trace, index)
        replica.submit(spec, self.now, self._terms.of(index), self._clients[index])
        self._plan(place)

    def _advance(self, place: int) -> None:
        """Book what a replica has done, and let it go on."""
        replica, now = self.replicas[place], self.now
        steps = replica.advance(now)
        # A look in vain: requests wait, and nothing is under way.
        is_idle = not steps and replica.next_event() == inf
        self._num_idle = self._num_idle + 1 if is_idle else 0
        if self._num_idle > _MAX_IDLE_TICKS:
            raise StandstillError(f"at {now:.1f} s requests wait on {self._names[place]} for ever")
        first_token_at = self._shard.first_token_at
        for step in steps:
            for index, has_ended in zip(step.reported, step.outcome.finish):
                if has_ended:
                    self._num_left -= 1
                    self._routing.ended(str(index), now)
                elif first_token_at[index] == now:
                    self._routing.begins(str(index))
        self._plan(place)
        self._load_next(place)

    def _plan(self, place: int) -> None:
        replica = self.replicas[place]
        replica.plan(self.now)
        upcoming = replica.next_event()
        if upcoming == inf and not replica.scheduler.is_idle:
            upcoming = self.now + _IDLE_TICK_S
        if upcoming != self._due[place]:
            self._due[place] = upcoming
            if upcoming < inf:
                heappush(self._heap, (upcoming, place))

    # --- results ------------------------------------------------------------------

    def _result(self) -> FleetRun:
        return FleetRun(
            trace=self._trace,
            num_replicas=len(self._names),
            first_token_at=self._shard.first_token_at,
            ended_at=self._shard.ended_at,
            loads=[lane.num_loads for lane in self.lanes],
            fetches=[lane.num_fetches for lane in self.lanes],
            busy=[float(np.sum(each.step_seconds)) for each in self.replicas],
            num_steps=sum(len(each.step_seconds) for each in self.replicas),
            end=self.now,
        )
