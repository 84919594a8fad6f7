"""A scheduler and shards that take one second a step: each row that may gets a token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorax_contract.step import (
    AdapterHandle,
    FinishCode,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
    TokenColumns,
)
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.request import RequestTerms
from lorax_router.core.scheduler import Scheduler


class CoreWorld:
    """Counts who got what, in lockstep.

    Args:
        policy: what is tried.
        adapters: its table; adapters are there one step after they were ordered.
        num_blocks, max_rows, max_step_tokens: of the scheduler; blocks have 4 tokens.
        limits: of the scheduler, too.
    """

    def __init__(
        self,
        policy: SchedulingPolicy,
        *,
        adapters: AdapterTable | None = None,
        num_blocks: int = 1000,
        max_rows: int = 4,
        max_step_tokens: int = 64,
        **limits: Any,
    ) -> None:
        self.adapters = adapters or AdapterTable(max_resident=64)
        self.scheduler = Scheduler(
            num_blocks=num_blocks, block_size=4, max_step_tokens=max_step_tokens,
            max_rows=max_rows, depth=1, policy=policy, adapters=self.adapters, **limits,
        )  # fmt: skip
        self.now = 0.0
        self.terms: dict[int, RequestTerms] = {}
        # By request: when it was first admitted, when it ended, its output tokens.
        self.admitted: dict[int, float] = {}
        self.ended: dict[int, float] = {}
        self.tokens: dict[int, int] = {}
        # Requests that ended since they were too late, and why.
        self.late: dict[int, str] = {}
        # By request, how often it was made to give way.
        self.num_preemptions: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self._num_prompt: dict[int, int] = {}
        self._computed: dict[int, int] = {}

    def submit(
        self, terms: RequestTerms, num_prompt: int = 4, num_output: int = 4, adapter: int = 0,
        max_new: int | None = None, start: int | None = None,
    ) -> int:  # fmt: skip
        """Queue a request that ends by itself after ``num_output`` tokens; return its number."""
        number = len(self.terms) + 1
        handle = AdapterHandle(adapter)
        if adapter and handle not in self.adapters:
            self.adapters.add(handle, 1)
        # No two requests begin alike, unless one is told to.
        start = 10_000 * number if start is None else start
        most = num_output if max_new is None else max_new
        spec = RequestSpec(
            request_id=RequestId(number), prompt_ids=range(start, start + num_prompt), sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=most), adapter=handle,
        )  # fmt: skip
        self.scheduler.submit(spec, self.now, terms)
        self.terms[number], self._left[number], self.tokens[number] = terms, num_output, 0
        self._num_prompt[number] = num_prompt
        return number

    def step(self, num: int = 1) -> None:
        """Let so many seconds pass."""
        for _ in range(num):
            plan = self.scheduler.plan(self.now)
            self.late.update(self.scheduler.deadlines.take_late())
            orders = self.scheduler.adapter_orders()
            self.now += 1.0
            if plan is not None:
                for row in plan.new_rows:
                    self._note_admission(row.spec.request_id)
                self.scheduler.apply(self._outcome(plan), self.now)
            for event, handles in (
                (AdapterEvent.PREPARED, orders.prepare),
                (AdapterEvent.RELEASED, orders.release),
            ):
                for handle in handles:
                    self.scheduler.adapter_event(handle, event, self.now, epoch=1)
            self.scheduler.check()

    def _note_admission(self, number: int) -> None:
        if number in self.admitted:
            self.num_preemptions[number] = self.num_preemptions.get(number, 0) + 1
        self.admitted.setdefault(number, self.now - 1.0)

    def _outcome(self, plan: StepPlan) -> StepOutcome:
        self._computed.update((row.spec.request_id, row.num_cached) for row in plan.new_rows)
        for row, num_tokens in zip(plan.row_ids, plan.num_tokens, strict=True):
            self._computed[row] += num_tokens
        rows = [row for row in plan.row_ids if self._computed[row] == self._known(row)]
        for row in rows:
            self._left[row] -= 1
            self.tokens[row] += 1
            if not self._left[row]:
                self.ended[row] = self.now
        num = len(rows)
        return StepOutcome(
            seq=plan.seq,
            row_ids=rows,
            num_tokens=[1] * num,
            finish=[
                FinishCode.RUNNING if self._left[row] else FinishCode.EOS_TOKEN for row in rows
            ],
            tokens=TokenColumns([1] * num, [0.0] * num, [""] * num, [False] * num),
        )

    def _known(self, number: int) -> int:
        return self._num_prompt[number] + self.tokens[number]

    def run_until_idle(self, most: int = 10_000) -> None:
        """Let all requests end."""
        for _ in range(most):
            if self.scheduler.is_idle:
                return
            self.step()
        raise AssertionError("requests are left")

    def tokens_of(self, tenant: str, numbers: Iterable[int] | None = None) -> int:
        """Return how many output tokens a tenant got."""
        return sum(
            self.tokens[number] for number in numbers or self.terms
            if self.terms[number].tenant == tenant
        )  # fmt: skip
