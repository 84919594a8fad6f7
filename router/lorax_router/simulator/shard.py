"""The rows of the simulated shards: what a step costs, and what comes of it."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lorax_contract.step import FinishCode, RequestId, StepOutcome, StepPlan, TokenColumns
from lorax_router.core.cost import StepWork
from lorax_router.core.policies.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from lorax_router.simulator.server import SimulatedServer
from lorax_router.simulator.trace import Floats, Trace

_NEVER = -1.0


@dataclass(slots=True)
class ExecutedStep:
    """A step on its way: its outcome, and whom it gives how much."""

    outcome: StepOutcome
    work: StepWork
    amounts: dict[int, float]
    # Whose requests got a token, in the order of the outcome.
    reported: list[int]


class SimulatedRow:
    """A request on the shards."""

    __slots__ = (
        "adapter", "client", "context", "has_left", "index", "left", "needs", "num_prompt", "rank",
    )  # fmt: skip

    index: int
    client: int
    adapter: int
    rank: int
    num_prompt: int
    # Tokens in the cache; to be computed before the next token comes; of its output to come.
    context: int
    needs: int
    left: int
    # Whether it was in a pass that failed: steps planned before that was known pass over it.
    has_left: bool


class SimulatedShard:
    """Executes plans in their order; knows how long each output is.

    Rows are few and reused; what is kept of a request are numbers in columns.

    Args:
        fails: whether a pass of several rows fails; None: none does.
    """

    def __init__(
        self,
        trace: Trace,
        server: SimulatedServer,
        fails: Callable[[StepPlan], bool] | None = None,
    ) -> None:
        self._fails = fails
        self._clients = [int(each) for each in trace.clients]
        self._adapters = [int(each) for each in trace.adapters]
        self._prompts = [int(each) for each in trace.prompts]
        self._outputs = [int(each) for each in trace.outputs]
        self._limits = [int(each) for each in trace.limits]
        self._ranks = trace.adapter_ranks
        self._bytes = [rank * server.bytes_per_rank for rank in trace.adapter_ranks]
        self._rows: dict[RequestId, SimulatedRow] = {}
        # Prompt tokens that were computed once: those count as service once.
        self._served_prompt = [0] * len(trace)
        self._last_token_at = [_NEVER] * len(trace)
        self.first_token_at: Floats = np.full(len(trace), np.nan)
        self.ended_at: Floats = np.full(len(trace), np.nan)
        # Between two tokens of an output, in seconds.
        self.token_gaps = array("f")
        self.num_tokens = 0

    def enter(self, plan: StepPlan) -> tuple[list[int], list[int]]:
        """Let rows leave and enter; return the clients of those that gave way, and of new ones."""
        gave_way = []
        for request in plan.drop:
            row = self._rows.pop(request, None)
            if row is not None:
                gave_way.append(row.client)
        entered = []
        for new in plan.new_rows:
            index = new.spec.request_id - 1
            row = self._rows[new.spec.request_id] = SimulatedRow()
            row.index = index
            row.client = self._clients[index]
            row.adapter = self._adapters[index]
            row.rank = self._ranks[row.adapter]
            row.num_prompt = self._prompts[index]
            row.context = new.num_cached
            row.needs = row.num_prompt + len(new.output_ids) - new.num_cached
            row.left = self._outputs[index] - len(new.output_ids)
            row.has_left = False
            entered.append(row.client)
        return gave_way, entered

    def execute(self, plan: StepPlan) -> ExecutedStep:
        """Compute a step; rows that ended in the one before are skipped."""
        rows = self._rows
        if self._fails is not None and len(plan.row_ids) > 1 and self._fails(plan):
            return self._failed(plan)
        reported: list[int] = []
        amounts: dict[int, float] = {}
        adapters = set()
        ids: list[RequestId] = []
        finish: list[int] = []
        tokens = kv_read = token_ranks = attended = 0
        for request, num in zip(plan.row_ids, plan.num_tokens):
            row = rows.get(request)
            if row is None or row.has_left:
                continue
            context = row.context
            row.context = context + num
            tokens += num
            kv_read += context + num
            attended += num * context + num * (num + 1) // 2
            token_ranks += num * row.rank
            adapters.add(row.adapter)
            amount = self._prompt_service(row, context, num) if context < row.num_prompt else 0.0
            if row.needs == num:
                row.needs = 1
                row.left -= 1
                amount += OUTPUT_WEIGHT
                reported.append(row.index)
                ids.append(request)
                if row.left:
                    finish.append(0)
                else:
                    finish.append(self._end(request, row.index))
            else:
                row.needs -= num
            client = row.client
            amounts[client] = amounts.get(client, 0.0) + amount
        self.num_tokens += tokens
        nbytes = sum(self._bytes[each] for each in adapters)
        count = len(ids)
        outcome = StepOutcome(plan.seq, ids, [1] * count, finish, TokenColumns(ids=[0] * count))
        work = StepWork(tokens, kv_read, nbytes, token_ranks, attended)
        return ExecutedStep(outcome, work, amounts, reported)

    def _failed(self, plan: StepPlan) -> ExecutedStep:
        """Compute a step in vain: as far as anybody knows it takes no time."""
        outcome = StepOutcome(plan.seq)
        for request in plan.row_ids:
            row = self._rows.get(request)
            if row is not None and not row.has_left:
                row.has_left = True
                outcome.failed.append(request)
        return ExecutedStep(outcome, StepWork(0, 0, 0, 0), {}, [])

    def _prompt_service(self, row: SimulatedRow, context: int, num: int) -> float:
        """Return what tokens of a prompt count, if they are computed for the first time."""
        before = self._served_prompt[row.index]
        after = max(before, min(context + num, row.num_prompt))
        self._served_prompt[row.index] = after
        return PROMPT_WEIGHT * (after - before)

    def _end(self, request: RequestId, index: int) -> int:
        del self._rows[request]
        is_cut = self._outputs[index] == self._limits[index]
        return int(FinishCode.LENGTH if is_cut else FinishCode.EOS_TOKEN)

    def publish(self, step: ExecutedStep, now: float) -> None:
        """The tokens of a step are there."""
        gaps, last_token_at = self.token_gaps, self._last_token_at
        for index, has_ended in zip(step.reported, step.outcome.finish):
            last = last_token_at[index]
            if last >= 0:
                gaps.append(now - last)
            else:
                self.first_token_at[index] = now
            last_token_at[index] = now
            if has_ended:
                self.ended_at[index] = now
