"""The router's own time, without a model.

``plan_ms``: one ``Scheduler.plan`` with 256 running and 1,000 waiting requests.
``plan_adapters_ms``: the same with 1,000 known adapters, 64 of them on the shards and in use
and 500 others waited for.
``turnaround_ms``: at 256 rows, from a step's reply coming in to the next request being
handed to the transport, in the real engine loop against FakeShard with 256 open streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections import deque
from pathlib import Path
from time import perf_counter

from lorax_contract.step import (
    AdapterHandle,
    FinishCode,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.memory import FakeMemory
from lorax_router.shards.fake.shard import FakeModel, FakeShard

NUM_ROWS = 256
NUM_WAITING = 1_000
NUM_SLOTS, NUM_WAITING_ADAPTERS, NUM_KNOWN = 64, 500, 1_000
NUM_STEPS = 200
NUM_BLOCKS, BLOCK_SIZE = 20_000, 16
# No token ends a request early.
MODEL = FakeModel(eos_token_ids=frozenset())


def make_spec(request_id: int, rng: random.Random, adapter: int = 0) -> RequestSpec:
    """Return a request that outlives the measurement."""
    return RequestSpec(
        request_id=RequestId(request_id),
        prompt_ids=[rng.randrange(1000) for _ in range(rng.randint(16, 128))],
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=4 * NUM_STEPS),
        adapter=AdapterHandle(adapter),
    )


def make_scheduler(depth: int, num_known: int = 0) -> Scheduler:
    """Return a scheduler that runs 256 rows and knows adapters of one byte."""
    # Never a turn for those who wait: what is measured is that they wait.
    table = AdapterTable(max_resident=NUM_SLOTS, max_bytes=NUM_SLOTS, cycle_time_s=1e9)
    for handle in range(1, num_known + 1):
        table.add(AdapterHandle(handle), 1)
    return Scheduler(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_step_tokens=4096, max_rows=NUM_ROWS,
        depth=depth, adapters=table,
    )  # fmt: skip


def submit_all(scheduler: Scheduler) -> None:
    """Fill all rows, and let as many wait as is said above."""
    rng = random.Random(0)
    for request_id in range(1, NUM_ROWS + NUM_WAITING + 1):
        scheduler.submit(make_spec(request_id, rng), 0.0)


def submit_by_adapter(scheduler: Scheduler) -> None:
    """Fill all rows with requests of the adapters that have a slot, and let the others wait."""
    rng = random.Random(0)
    for request_id in range(1, NUM_ROWS + 1):
        scheduler.submit(make_spec(request_id, rng, 1 + request_id % NUM_SLOTS), 0.0)
    for number in range(NUM_WAITING):
        adapter = NUM_SLOTS + 1 + number % NUM_WAITING_ADAPTERS
        scheduler.submit(make_spec(NUM_ROWS + 1 + number, rng, adapter), 1.0)


def carry_out_orders(scheduler: Scheduler) -> dict[AdapterHandle, str]:
    """Let all orders succeed; return what the shard holds then."""
    scheduler.plan(0.0)
    orders = scheduler.adapter_orders()
    for handle in orders.prepare:
        scheduler.adapter_event(handle, AdapterEvent.PREPARED, 0.0, epoch=orders.epoch)
    return dict.fromkeys(orders.prepare, "content")


def measure_plan(
    scheduler: Scheduler, prepared: dict[AdapterHandle, str]
) -> tuple[list[float], list[float]]:
    """Return the seconds of each plan and each apply at full load."""
    shard = FakeBatch(MODEL, FakeMemory(NUM_BLOCKS, BLOCK_SIZE))
    plans: deque[StepPlan] = deque()
    plan_s: list[float] = []
    apply_s: list[float] = []
    while len(plan_s) < NUM_STEPS:
        start = perf_counter()
        plan = scheduler.plan(2.0)
        seconds = perf_counter() - start
        if plan is not None:
            plans.append(plan)
            if sum(plan.num_tokens) == len(plan.row_ids) == NUM_ROWS:
                plan_s.append(seconds)
            continue
        outcome = shard.execute(plans.popleft(), prepared, {})
        start = perf_counter()
        scheduler.apply(outcome, 2.0)
        apply_s.append(perf_counter() - start)
    return plan_s, apply_s


class WatchedShard(FakeShard):
    """Notes when a full step's reply goes out and when the next request comes in."""

    def __init__(self) -> None:
        super().__init__(MODEL, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.replied_at = 0.0
        self.turnarounds: list[float] = []

    async def step(self, plan: StepPlan, epoch: int | None = None) -> StepOutcome:
        """Execute one step."""
        if self.replied_at and len(plan.row_ids) == NUM_ROWS:
            self.turnarounds.append(perf_counter() - self.replied_at)
        outcome = await super().step(plan, epoch)
        self.replied_at = perf_counter()
        return outcome


async def measure_turnaround(depth: int) -> list[float]:
    """Return the seconds from each reply to the next request."""
    shard = WatchedShard()
    loop = EngineLoop(shard, make_scheduler(depth))
    rng = random.Random(0)
    streams = [loop.submit(make_spec(index, rng)) for index in range(1, NUM_ROWS + 1)]

    async def read(stream: object) -> None:
        async for chunk in stream:  # type: ignore[attr-defined]
            if chunk.finish is not FinishCode.RUNNING:
                return

    readers = [asyncio.ensure_future(read(stream)) for stream in streams]
    running = asyncio.ensure_future(loop.run())
    while len(shard.turnarounds) < NUM_STEPS:
        await asyncio.sleep(0.01)
    for task in (*readers, running):
        task.cancel()
    await asyncio.gather(*readers, running, return_exceptions=True)
    return shard.turnarounds


def median_ms(seconds: list[float]) -> float:
    """Return the median in milliseconds."""
    return round(statistics.median(seconds) * 1e3, 3)


def main() -> None:
    """Print the figures as a table, and as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {
        "plan_ms_p50": {}, "plan_adapters_ms_p50": {}, "apply_ms_p50": {}, "turnaround_ms_p50": {}
    }  # fmt: skip
    for depth in (1, 2):
        scheduler = make_scheduler(depth, NUM_KNOWN)
        submit_by_adapter(scheduler)
        plan_s, _ = measure_plan(scheduler, carry_out_orders(scheduler))
        figures["plan_adapters_ms_p50"][f"depth {depth}"] = median_ms(plan_s)
        scheduler = make_scheduler(depth)
        submit_all(scheduler)
        plan_s, apply_s = measure_plan(scheduler, {})
        figures["plan_ms_p50"][f"depth {depth}"] = median_ms(plan_s)
        figures["apply_ms_p50"][f"depth {depth}"] = median_ms(apply_s)
        # With two steps in flight a reply and a request cross: only lockstep shows the turn.
        if depth == 1:
            turns = asyncio.run(measure_turnaround(depth))
            figures["turnaround_ms_p50"][f"depth {depth}"] = median_ms(turns)
    for name, values in figures.items():
        print(f"{name:<20}  {values}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
