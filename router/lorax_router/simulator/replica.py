"""One scheduler with the devices and links that it plans for, driven by whoever owns the clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from lorax_contract.step import RequestSpec
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies import SchedulingPolicy, make_policy
from lorax_router.core.request import RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.swapping import RecomputeCost
from lorax_router.simulator.loads import LoadLane
from lorax_router.simulator.server import SimulatedServer
from lorax_router.simulator.service import ServiceMeter
from lorax_router.simulator.shard import ExecutedStep, SimulatedShard


class SimulatedReplica:
    """A server: its scheduler, its steps on the device, its adapters on their way.

    Args:
        server: its sizes and speeds.
        policy: the policy's name.
        table: the adapters that it knows.
        shard: executes plans; several replicas may share one, since it tells requests apart.
        meter: counts service.
        make: makes the policy of that name.
        loads: carries out orders about adapters; one that has all at the same distance if absent.
        check_every: check the scheduler's invariants every so many steps; 0: never.
        recompute: what the scheduler takes computing tokens again for; what it learns if absent.
    """

    def __init__(
        self,
        server: SimulatedServer,
        policy: str,
        table: AdapterTable,
        shard: SimulatedShard,
        meter: ServiceMeter,
        *,
        make: Callable[[str, AdapterTable], SchedulingPolicy] = make_policy,
        loads: LoadLane | None = None,
        check_every: int = 0,
        recompute: RecomputeCost | None = None,
    ) -> None:
        self._server, self._shard, self._meter = server, shard, meter
        self._check_every = check_every
        self.table = table
        self.loads = loads if loads is not None else LoadLane(server, table)
        self.scheduler = Scheduler(
            num_blocks=server.num_blocks,
            block_size=server.block_size,
            max_step_tokens=server.max_step_tokens,
            max_rows=server.max_rows,
            depth=server.depth,
            policy=make(policy, table),
            adapters=table,
            # A trace does not say which prompts begin alike.
            prefix_caching=False,
            batching=server.batching,
            max_waiting_tokens=server.max_waiting_tokens,
            max_kv_read=server.max_kv_read,
            max_partial_prompts=server.max_partial_prompts,
            target_itl_s=None if server.target_itl_ms is None else server.target_itl_ms / 1e3,
            num_host_blocks=server.num_host_blocks,
            block_move_s=server.block_move_s,
            recompute=recompute,
        )
        # When each step in flight ends; when the device is free.
        self._in_flight: deque[tuple[float, ExecutedStep]] = deque()
        self._device_free_at = 0.0
        self.step_seconds: list[float] = []

    def next_event(self) -> float:
        """Return when something of its own happens next; inf if nothing will by itself."""
        upcoming = self._in_flight[0][0] if self._in_flight else inf
        load = self.loads.next_end()
        return load if load is not None and load < upcoming else upcoming

    def advance(self, now: float) -> list[ExecutedStep]:
        """Book the outcomes and adapters that are there by now; return the steps."""
        done: list[ExecutedStep] = []
        while self._in_flight and self._in_flight[0][0] <= now:
            done.append(self._apply())
        while (load := self.loads.next_end()) is not None and load <= now:
            handle, event = self.loads.pop(now)
            self.scheduler.adapter_event(handle, event, now, epoch=1)
        return done

    def submit(self, spec: RequestSpec, now: float, terms: RequestTerms, client: int) -> None:
        """Take a request of a client."""
        self.scheduler.submit(spec, now, terms)
        self._meter.waits(client)

    def plan(self, now: float) -> None:
        """Plan as far ahead as the scheduler may, and put the steps on the device."""
        scheduler, server = self.scheduler, self._server
        while scheduler.num_in_flight < server.depth:
            plan = scheduler.plan(now)
            self.loads.take(scheduler.adapter_orders(), now)
            if plan is None:
                return
            gave_way, entered = self._shard.enter(plan)
            for client in gave_way:
                self._meter.waits(client)
            for client in entered:
                self._meter.leaves(client)
            step = self._shard.execute(plan)
            begin = max(now + server.host_s, self._device_free_at)
            self._device_free_at = begin
            if plan.row_ids:
                seconds = server.cost.seconds(step.work)
                if plan.copies:
                    seconds += len(plan.copies) * server.block_move_s
                step.outcome.total_ns = round(1e9 * seconds)
                self._device_free_at += seconds
                self.step_seconds.append(seconds)
            self._in_flight.append((self._device_free_at, step))

    def _apply(self) -> ExecutedStep:
        end, step = self._in_flight.popleft()
        self._shard.publish(step, end)
        self._meter.serve(step.amounts, end)
        self.scheduler.apply(step.outcome, end)
        self.loads.take(self.scheduler.adapter_orders(), end)
        if self._check_every and len(self.step_seconds) % self._check_every == 0:
            self.scheduler.check()
        return step
