"""The scheduler's state machine under all that limits a step: nothing starves or is exceeded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from tests.unit.core.test_scheduler_machine import NUM_STEPS, STEPS_PER_EXAMPLE, SchedulerMachine

from lorax_contract.step import RequestId, StepPlan

PREFILL = {"batching": "prefill"}
DECODE = {"batching": "decode", "max_waiting_tokens": 3}
READS = {"max_kv_read": 9, "max_partial_prompts": 2}
PACED = {"target_itl_s": 0.003}


class BudgetMachine(SchedulerMachine):
    """Its steps take some time, wild ones among them; what they read is looked at."""

    def _note_touched(self, plan: StepPlan) -> None:
        super()._note_touched(plan)
        if not hasattr(self, "read"):
            self.read: dict[RequestId, int] = {}
        self.read.update((new.spec.request_id, new.num_cached) for new in plan.new_rows)
        for row, num in zip(plan.row_ids, plan.num_tokens, strict=True):
            self.read[row] += num
        assert sum(plan.num_tokens) <= self.scheduler.max_step_tokens
        most = self.limits.get("max_kv_read")
        num_read = sum(self.read[row] for row in plan.row_ids)
        if most is not None:
            assert num_read <= most or len(plan.row_ids) == 1
            self.counts["full reads"] = self.counts.get("full reads", 0) + (num_read >= most)

    @precondition(lambda self: self.plans)
    @rule()
    def run(self) -> None:
        """The shard executes the oldest plan, in a time that is of no use now and then."""
        super().run()
        outcome = self.outcomes[-1]
        outcome.total_ns = (outcome.seq * 7919 % 13) * 1_000_000


@pytest.mark.parametrize(
    ("policy", "depth", "limits"),
    [
        ("fcfs", 2, PREFILL),
        ("fcfs", 2, DECODE),
        ("fcfs", 2, READS),
        ("fair", 2, {**PREFILL, **READS, **PACED}),
        ("priority", 1, {**DECODE, **READS, **PACED}),
        ("fair", 2, {**READS, **PACED}),
        ("lorax", 2, DECODE),
    ],
    ids=str,
)
def test_any_order_of_events_ends_well_within_all_budgets(
    policy: str, depth: int, limits: dict[str, Any]
) -> None:
    """As the machine of the scheduler, a third as long for each."""
    counts: dict[str, int] = {}
    values = {"depth": depth, "policy": policy, "counts": counts, "limits": limits}
    run_state_machine_as_test(
        type("Machine", (BudgetMachine,), values),
        settings=settings(
            max_examples=max(NUM_STEPS // 60, 1),
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # Which events come changes with each constant in the sources: that is where Hypothesis looks.
    assert counts["plans"] >= NUM_STEPS // 100
    assert counts.get("full reads", 1) > 0
