"""What a plan and an apply cost under a full load, for each policy and shape of batches.

256 requests run and 5,000 wait, of 1,000 adapters: 500 are on the shards and have half of those
who wait, 500 wait for a slot. There are 50 tenants and three classes. Time passes: 20 ms a step,
so that turns of adapters come, and orders are carried out at once.

``decode``: all rows get one token, no row is free.
``prompts``: outputs are short, so that in each step some end and others enter with prompts.
``memory``: rows are free and blocks are not: those first in line are looked at in vain in each
step, all of whose 1,024 first tokens are in the cache.

Times are the processor's, of the thread that plans, which does nothing else: neighbours on the
machine cost it little.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from time import thread_time
from typing import Any

from lorax_contract.config import SCHEDULING_POLICIES
from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterEvent
from lorax_router.core.request import RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.settings import CoreSettings, make_scheduler
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.memory import FakeMemory
from lorax_router.shards.fake.shard import FakeModel

NUM_ROWS, NUM_WAITING = 256, 5_000
NUM_ADAPTERS, NUM_SLOTS = 1_000, 500
NUM_TENANTS, NUM_CLASSES = 50, 3
NUM_STEPS = 100
# A policy that reserves the most that a request may need has fewer rows where memory is short.
_MAX_FILL_STEPS = 150
STEP_S = 0.02
BLOCK_SIZE = 16
# No token ends a request early.
MODEL = FakeModel(eos_token_ids=frozenset())


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What batches look like."""

    num_blocks: int = 60_000
    max_rows: int = NUM_ROWS
    # Tokens of an output, from and to; of a beginning that requests of an adapter share; of the
    # rest of a prompt that waits.
    outputs: tuple[int, int] = (1_000, 2_000)
    shared: int = 0
    rest: tuple[int, int] = (16, 128)


SHAPES = {
    "decode": Shape(),
    "prompts": Shape(outputs=(8, 64)),
    "memory": Shape(
        num_blocks=NUM_ROWS * 80, max_rows=2 * NUM_ROWS, shared=1_024, rest=(8_000, 9_000)
    ),
}


def batchings() -> list[str | None]:
    """Return how steps may be filled, if there is a choice."""
    if all(field.name != "batching" for field in fields(CoreSettings)):
        return [None]
    return ["mixed", "prefill", "decode"]


class PlanningLoad:
    """A scheduler under the load above, and a shard that executes its plans."""

    def __init__(
        self,
        policy: str,
        shape: Shape,
        batching: str | None = None,
        *,
        make: Callable[[CoreSettings], Scheduler] = make_scheduler,
        clock: Callable[[], float] = thread_time,
    ) -> None:
        self._clock = clock
        self._draw = random.Random(0)
        self._shape = shape
        self._num_requests = 0
        self._beginnings: dict[int, bytes] = {}
        self._now = 0.0
        options: dict[str, Any] = {} if batching is None else {"batching": batching}
        settings = CoreSettings(
            policy=policy, num_blocks=shape.num_blocks, block_size=BLOCK_SIZE,
            max_step_tokens=4_096, max_rows=shape.max_rows, max_resident=NUM_SLOTS, **options,
        )  # fmt: skip
        self.scheduler = make(settings)
        self._shard = FakeBatch(MODEL, FakeMemory(shape.num_blocks, BLOCK_SIZE))
        self._prepared: dict[AdapterHandle, str] = {}
        self._plans: deque[StepPlan] = deque()
        self.plan_s: list[float] = []
        self.apply_s: list[float] = []
        for handle in range(1, NUM_ADAPTERS + 1):
            self.scheduler.adapters.add(AdapterHandle(handle), 1)

    def submit(self, adapter: int, rest: tuple[int, int] = (16, 128)) -> None:
        """Queue a request of an adapter."""
        self._num_requests += 1
        draw = self._draw
        beginning = self._beginnings.get(adapter)
        if beginning is None:
            beginning = draw.randbytes(self._shape.shared)
            self._beginnings[adapter] = beginning
        spec = RequestSpec(
            request_id=RequestId(self._num_requests),
            # Small ids, of which 5,000 prompts take little memory.
            prompt_ids=beginning + draw.randbytes(draw.randint(*rest)),
            sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=draw.randint(*self._shape.outputs)),
            adapter=AdapterHandle(adapter),
        )
        terms = RequestTerms(
            f"tenant {adapter % NUM_TENANTS}", priority=draw.randrange(NUM_CLASSES)
        )
        self.scheduler.submit(spec, self._now, terms)

    def fill(self) -> None:
        """Let the rows run and the others wait."""
        for number in range(NUM_ROWS):
            self.submit(1 + number % NUM_SLOTS)
        for _ in range(_MAX_FILL_STEPS):
            if not self.scheduler.stats().num_waiting:
                break
            self._step()
        for number in range(NUM_WAITING):
            self.submit(1 + number % NUM_ADAPTERS, self._shape.rest)

    def measure(self) -> None:
        """Run the steps that count; as many come as end."""
        # As the router does when it is ready.
        gc.collect()
        gc.freeze()
        for _ in range(20):
            self._step()
        self.plan_s.clear()
        self.apply_s.clear()
        arrivals: Iterator[int] = iter(lambda: 1 + self._draw.randrange(NUM_ADAPTERS), 0)
        while len(self.plan_s) < NUM_STEPS:
            self._step()
            while self.scheduler.stats().num_waiting < NUM_WAITING:
                self.submit(next(arrivals), self._shape.rest)

    def _step(self) -> None:
        scheduler = self.scheduler
        while scheduler.num_in_flight < scheduler.depth:
            start = self._clock()
            plan = scheduler.plan(self._now)
            self.plan_s.append(self._clock() - start)
            self._carry_out_orders()
            if plan is None:
                break
            self._plans.append(plan)
        self._now += STEP_S
        if not self._plans:
            return
        outcome = self._shard.execute(self._plans.popleft(), self._prepared, {})
        start = self._clock()
        scheduler.apply(outcome, self._now)
        self.apply_s.append(self._clock() - start)
        self._carry_out_orders()

    def _carry_out_orders(self) -> None:
        orders = self.scheduler.adapter_orders()
        for event, handles in (
            (AdapterEvent.PREPARED, orders.prepare),
            (AdapterEvent.RELEASED, orders.release),
        ):
            for handle in handles:
                self._prepared[handle] = f"content {handle}"
                self.scheduler.adapter_event(handle, event, self._now, epoch=orders.epoch)


def figures_of(policy: str, shape: str, batching: str | None = None) -> dict[str, float]:
    """Return medians and 99th percentiles in milliseconds."""
    load = PlanningLoad(policy, SHAPES[shape], batching)
    load.fill()
    load.measure()
    figures: dict[str, float] = {}
    for name, seconds in (("plan", load.plan_s), ("apply", load.apply_s)):
        figures[f"{name}_ms_p50"] = round(statistics.median(seconds) * 1e3, 3)
        figures[f"{name}_ms_p99"] = round(statistics.quantiles(seconds, n=100)[98] * 1e3, 3)
    return figures


def main() -> None:
    """Print the figures as a table, and as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", action="append", choices=SCHEDULING_POLICIES)
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for policy in arguments.policy or SCHEDULING_POLICIES:
        for shape in arguments.shape or SHAPES:
            for batching in batchings():
                name = " ".join(filter(None, (policy, shape, batching)))
                figures[name] = figures_of(policy, shape, batching)
                print(f"{name:<24}  {figures[name]}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
