"""What a step costs beside the shard's engine: its messages, and the router's planning and booking."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

from lorax_contract.step import (
    BlockId,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
    TokenColumns,
)
from lorax_proto import generate_pb2 as pb
from lorax_proto.convert import outcome_from_proto, outcome_to_proto, step_from_proto, step_to_proto
from lorax_router.core.scheduler import Scheduler
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.memory import FakeMemory
from lorax_router.shards.fake.shard import FakeModel

MESSAGES, ROUTER = "messages, made and read on both sides", "the router's plan and booking"
_CALLS, _BLOCK_SIZE, _NUM_BLOCKS = 50, 16, 20_000


def messages_seconds(num_rows: int) -> dict[str, float]:
    """Return the median seconds that a plan and its outcome take on the way, without the wire."""
    plan = make_plan(num_rows)
    outcome = make_outcome(plan)

    def there_and_back() -> None:
        request = step_to_proto(plan, 1)
        step_from_proto(type(request).FromString(request.SerializeToString()))
        reply = outcome_to_proto(outcome, pb.DecodeResponse)
        outcome_from_proto(pb.DecodeResponse.FromString(reply.SerializeToString()), 1)

    return {MESSAGES: _median(there_and_back)}


def scheduler_seconds(num_rows: int) -> dict[str, float]:
    """Return the median seconds of a plan and of its booking, all rows running."""
    scheduler = Scheduler(
        num_blocks=_NUM_BLOCKS,
        block_size=_BLOCK_SIZE,
        max_step_tokens=4096,
        max_rows=num_rows,
        depth=1,
    )
    shard = FakeBatch(FakeModel(eos_token_ids=frozenset()), FakeMemory(_NUM_BLOCKS, _BLOCK_SIZE))
    draw = random.Random(0)
    for number in range(num_rows):
        scheduler.submit(
            RequestSpec(
                request_id=RequestId(number + 1),
                prompt_ids=[draw.randrange(1000) for _ in range(64)],
                sampling=SamplingParams(),
                stopping=StoppingParams(max_new_tokens=4 * _CALLS),
            ),
            0.0,
        )
    seconds: list[float] = []
    while len(seconds) < _CALLS:
        started = time.perf_counter()
        plan = scheduler.plan(1.0)
        planned = time.perf_counter() - started
        assert plan is not None
        outcome = shard.execute(plan, {}, {})
        started = time.perf_counter()
        scheduler.apply(outcome, 1.0)
        if len(plan.row_ids) == num_rows == sum(plan.num_tokens):
            seconds.append(planned + time.perf_counter() - started)
    return {ROUTER: statistics.median(seconds)}


def make_plan(num_rows: int) -> StepPlan:
    """Return a decode step in which one row of sixteen gains a block."""
    gains = [int(row % 16 == 0) for row in range(num_rows)]
    return StepPlan(
        seq=1000,
        row_ids=[RequestId(50_000 + row) for row in range(num_rows)],
        num_tokens=[1] * num_rows,
        num_new_blocks=gains,
        new_blocks=[BlockId(3000 + block) for block in range(sum(gains))],
    )


def make_outcome(plan: StepPlan) -> StepOutcome:
    """Return the outcome of a plan: a token for each row."""
    num_rows = len(plan.row_ids)
    return StepOutcome(
        plan.seq,
        plan.row_ids,
        plan.num_tokens,
        [0] * num_rows,
        TokenColumns(
            [20_000 + row for row in range(num_rows)],
            [-0.5] * num_rows,
            [f" word{row}" for row in range(num_rows)],
            [False] * num_rows,
        ),
    )


def _median(call: Callable[[], None]) -> float:
    seconds = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
