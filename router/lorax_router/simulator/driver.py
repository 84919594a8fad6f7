"""The virtual clock: arrivals, steps and adapters of one workload under one policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies import SchedulingPolicy, make_policy
from lorax_router.core.request import RequestTerms
from lorax_router.core.swapping import RecomputeCost
from lorax_router.simulator.replica import SimulatedReplica
from lorax_router.simulator.server import SimulatedServer
from lorax_router.simulator.service import MAX_WINDOWS, ServiceMeter, most_asking
from lorax_router.simulator.shard import SimulatedShard
from lorax_router.simulator.trace import Floats, Trace

# How often turns of adapters are looked at while no step runs, as the engine loop does.
_IDLE_TICK_S = 0.5
# So many looks in a row without an effect mean that nothing will ever happen again.
_MAX_IDLE_TICKS = 10_000
# Prompts that share no token: the ids of request i begin at i times this.
_ID_SPACING = 1 << 24


class StandstillError(Exception):
    """Requests wait, and nothing that could change it is under way."""


@dataclass(slots=True, kw_only=True)
class SimulatedRun:
    """What came of a workload under one policy."""

    policy: str
    trace: Trace
    server: SimulatedServer
    meter: ServiceMeter
    first_token_at: Floats
    ended_at: Floats
    token_gaps: npt.NDArray[np.float32]
    step_seconds: npt.NDArray[np.float64]
    num_computed: int
    num_preemptions: int
    num_swaps: int
    num_loads: int
    end: float


class Simulation:
    """One run. Time comes from the workload, the cost model and the link, never from a clock.

    Args:
        trace: the requests.
        server: what they are served by.
        policy: the policy's name.
        make: makes the policy of that name.
        check_every: check the scheduler's invariants every so many steps; 0: never.
        recompute: what the scheduler takes computing tokens again for; what it learns if absent.
        fails: whether a pass of several rows fails; None: none does.
    """

    def __init__(
        self,
        trace: Trace,
        server: SimulatedServer,
        policy: str,
        *,
        make: Callable[[str, AdapterTable], SchedulingPolicy] = make_policy,
        check_every: int = 0,
        recompute: RecomputeCost | None = None,
        fails: Callable[[StepPlan], bool] | None = None,
    ) -> None:
        self._trace, self._server, self._policy = trace, server, policy
        table = AdapterTable(
            max_resident=server.max_adapters,
            max_bytes=server.adapter_pool_bytes,
            cycle_time_s=server.cycle_time_s,
        )
        for handle, rank in enumerate(trace.adapter_ranks):
            if handle:
                table.add(AdapterHandle(handle), rank * server.bytes_per_rank, rank=rank)
        work = trace.prompts + 2.0 * trace.outputs
        compared = most_asking(trace.clients, work, len(trace.client_names))
        window = max(float(trace.times[-1]), 1.0) / MAX_WINDOWS
        self._meter = ServiceMeter(trace.client_weights, compared, window)
        self._shard = SimulatedShard(trace, server, fails)
        self._replica = SimulatedReplica(
            server, policy, table, self._shard, self._meter,
            make=make, check_every=check_every, recompute=recompute,
        )  # fmt: skip
        self.scheduler = self._replica.scheduler
        self._clients = [int(each) for each in trace.clients]
        self._times = [float(each) for each in trace.times]
        self._terms = TermsOfTrace(trace)
        self._next_arrival = 0
        self._now = 0.0

    def run(self) -> SimulatedRun:
        """Serve all requests."""
        idle_ticks = 0
        while True:
            self._replica.plan(self._now)
            upcoming = self._next_event()
            if upcoming == inf:
                if self.scheduler.is_idle:
                    break
                upcoming = self._now + _IDLE_TICK_S
                idle_ticks += 1
                if idle_ticks > _MAX_IDLE_TICKS:
                    raise StandstillError(self._describe_standstill())
            else:
                idle_ticks = 0
            self._now = upcoming
            self._advance()
        self._meter.finish()
        return self._result()

    # --- events -------------------------------------------------------------------

    def _next_event(self) -> float:
        """Return when something happens next; inf if nothing will by itself."""
        own = upcoming = self._replica.next_event()
        if self._next_arrival < len(self._times):
            upcoming = min(upcoming, self._times[self._next_arrival])
            if own == inf and not self.scheduler.is_idle:
                upcoming = min(upcoming, self._now + _IDLE_TICK_S)
        return upcoming

    def _advance(self) -> None:
        """Book all that happens now: outcomes, adapters, arrivals."""
        now = self._now
        self._replica.advance(now)
        while self._next_arrival < len(self._times) and self._times[self._next_arrival] <= now:
            self._submit(self._next_arrival)
            self._next_arrival += 1

    def _submit(self, index: int) -> None:
        spec = request_of(self._trace, index)
        terms, client = self._terms.of(index), self._clients[index]
        self._replica.submit(spec, self._now, terms, client)

    # --- results ------------------------------------------------------------------

    def _describe_standstill(self) -> str:
        stats = self.scheduler.stats()
        return (
            f"at {self._now:.1f} s {stats.num_waiting} requests wait and {stats.num_running} run, "
            "and nothing is under way: the scheduler stands still"
        )

    def _result(self) -> SimulatedRun:
        stats = self.scheduler.stats()
        return SimulatedRun(
            policy=self._policy,
            trace=self._trace,
            server=self._server,
            meter=self._meter,
            first_token_at=self._shard.first_token_at,
            ended_at=self._shard.ended_at,
            token_gaps=np.frombuffer(self._shard.token_gaps, dtype=np.float32),
            step_seconds=np.array(self._replica.step_seconds),
            num_computed=self._shard.num_tokens,
            num_preemptions=stats.num_preemptions,
            num_swaps=stats.host.num_swaps,
            num_loads=self._replica.loads.num_loads,
            end=self._now,
        )


_SAMPLING = SamplingParams()


def request_of(trace: Trace, index: int) -> RequestSpec:
    """Return a request of a trace; its id is the index and one."""
    start = index * _ID_SPACING
    return RequestSpec(
        request_id=RequestId(index + 1),
        prompt_ids=range(start, start + int(trace.prompts[index])),
        sampling=_SAMPLING,
        stopping=StoppingParams(max_new_tokens=int(trace.limits[index])),
        adapter=AdapterHandle(int(trace.adapters[index])),
    )


class TermsOfTrace:
    """One RequestTerms for each tenant and priority."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._known: dict[tuple[int, int], RequestTerms] = {}

    def of(self, index: int) -> RequestTerms:
        """Return a request's terms."""
        trace = self._trace
        tenant, priority = int(trace.tenants[index]), int(trace.priorities[index])
        if (tenant, priority) not in self._known:
            name, weight = trace.tenant_names[tenant], trace.tenant_weights[tenant]
            self._known[tenant, priority] = RequestTerms(name, weight, priority)
        return self._known[tenant, priority]
