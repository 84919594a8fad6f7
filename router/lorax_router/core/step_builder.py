"""A step in the making: rows are placed into it until its tokens, reads, time or blocks are spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

from lorax_contract.step import BASE_ADAPTER, AdapterHandle, StepPlan
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.blocks import BlockPool
from lorax_router.core.cost import LinearCost, StepWork
from lorax_router.core.request import RequestState

# Prompts move on by so many tokens in a step, however late it makes those that wait for it.
LEAST_CHUNK = 16
# Where nobody set a target: long prompts have that part of the time that a step takes without
# them, for each prompt that waits. So a step with one takes about twice as long, and a prompt has
# half of the time, whatever else runs.
LONG_PART = 1.05
# Of that, what computing has at least, however long it takes to read what is in the cache: a prompt
# of any length moves on.
LEAST_COMPUTED = 0.5
# Prompts of which only a vector or scores are wanted have that part of the time that a step takes
# without them: nobody reads along, and who decodes waits for the next token at most so much longer.
POOLED_PART = 0.35
# Patient prompts have that part of what a step may compute, so that it is soon over.
PATIENT_PART = 4


class PlannedRow(NamedTuple):
    """One row of a step, as ``apply`` needs it."""

    request: RequestState
    incarnation: int
    num_tokens: int
    # Whether the row has computed all it knows then, so that the shard reports of it: a
    # token, or the end of a row that draws none.
    reports: bool


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What one step may take."""

    num_tokens: int
    # Tokens in the cache that its rows may attend to together; None: any number.
    max_kv_read: int | None = None
    # Seconds that it may take while somebody waits for the next token, and what work takes;
    # None: any time.
    target_s: float | None = None
    cost: LinearCost | None = None
    # Prompts are computed in one step or not at all, as encoders need them.
    is_whole: bool = False


class StepBuilder:
    """A plan, the rows in it, and what is left of the budget. Made by the Scheduler."""

    __slots__ = (
        "_adapters", "_attended", "_block_size", "_budget", "_known_adapters", "_long_s", "_pool", "_pooled_s", "_token_ranks", "budget", "has_round", "has_urgent_prompt",
        "is_paced", "is_stalled", "kv_read", "now", "num_prompt_tokens",
        "patient_budget", "patient_kept", "plan", "reserved", "rows",
    )  # fmt: skip

    def __init__(
        self,
        seq: int,
        budget: StepBudget,
        pool: BlockPool,
        block_size: int,
        adapters: AdapterTable,
        now: float,
    ) -> None:
        self.now = now
        self.plan = StepPlan(seq=seq)
        self.rows: list[PlannedRow] = []
        self.budget = budget.num_tokens
        # Of the budget, what prompts leave to others.
        self.reserved = 0
        # Of it, what patient prompts may have.
        self.patient_budget = max(budget.num_tokens // PATIENT_PART, LEAST_CHUNK)
        self.patient_kept = 0
        # Whether there is a prompt of others in it.
        self.has_urgent_prompt = False
        # Whether a running row stood still for want of a block.
        self.is_stalled = False
        # Whether somebody waits for the next token, so that the step must not take long.
        self.is_paced = False
        # Whether a round of admissions has begun, and nobody was admitted or deferred in it.
        self.has_round = False
        self.kv_read = 0
        self.num_prompt_tokens = 0
        self._budget = budget
        self._pool = pool
        self._block_size = block_size
        self._known_adapters = adapters
        # In this step, and of how many rows.
        self._adapters: dict[AdapterHandle, int] = {}
        self._token_ranks = 0
        self._attended = 0
        # Seconds that long prompts may add to it; None: as many as there are.
        self._long_s: float | None = None
        # The same of those of which a vector is wanted, once there is one.
        self._pooled_s: float | None = None

    @property
    def work(self) -> StepWork:
        """Return what the rows compute and read."""
        known = self._known_adapters
        nbytes = sum(known[handle].nbytes for handle in self._adapters)
        num_tokens = self._budget.num_tokens - self.budget
        return StepWork(num_tokens, self.kv_read, nbytes, self._token_ranks, self._attended)

    # --- what is left ---------------------------------------------------------------

    def may_read(self, num_kv_tokens: int) -> bool:
        """Whether a row may attend to so many tokens; the first of a step always may."""
        most = self._budget.max_kv_read
        return most is None or not self.rows or self.kv_read + num_kv_tokens <= most

    def prompt_limit(self) -> int:
        """Return the tokens that prompts without an adapter could have in what is left."""
        return self._chunk(BASE_ADAPTER, 0)

    def chunk(self, request: RequestState, num_cached: int | None = None) -> int:
        """Return the tokens of a prompt that fit, 0 if none do.

        ``num_cached`` is given of a request that would enter.
        """
        done = request.num_scheduled if num_cached is None else num_cached
        left = request.num_to_schedule if num_cached is None else request.num_tokens - num_cached
        if self._budget.is_whole:
            # A patient one may take more than its part, which is the next one's loss.
            return left if left <= self.budget and self.most(request) > 0 else 0
        num = min(self._chunk(request.spec.adapter, done), left)
        num = min(num, self.readable(done))
        if self.may_pace and request.spec.output.pools:
            num = min(num, self._pooled_chunk(request.spec.adapter, done))
        return min(num, self.most(request)) if request.is_patient else num

    def _pooled_chunk(self, adapter: AdapterHandle, num_done: int) -> int:
        """Return the tokens of a prompt that makes a vector, while others decode.

        The first of a step always has some: each moves on.
        """
        cost = self._budget.cost
        assert cost is not None
        if self._pooled_s is None:
            self._pooled_s = POOLED_PART * cost.seconds(self.work)
            return max(self._tokens_within(adapter, num_done, self._pooled_s), LEAST_CHUNK)
        return self._tokens_within(adapter, num_done, self._pooled_s)

    def pace_long(self, num_waiting: int) -> None:
        """Limit what long prompts add to a step, so that who decodes does not wait for all of it.

        They have LONG_PART of the time of what is placed so far, for each prompt that waits: the
        more wait for their first tokens, the longer others wait for their next ones.
        """
        cost = self._budget.cost
        assert cost is not None
        self._long_s = LONG_PART * num_waiting * cost.seconds(self.work)

    @property
    def may_pace(self) -> bool:
        """Whether somebody waits for the next token, nobody set a target, and prices are known."""
        budget = self._budget
        return self.is_paced and budget.target_s is None and budget.cost is not None

    def long_chunk(self, request: RequestState, num_sharing: int, num_done: int) -> int:
        """Return the tokens of a long prompt whose time is its part of what long ones have."""
        if self._long_s is None:
            return self.budget
        cost = self._budget.cost
        assert cost is not None
        part_s = self._long_s / num_sharing
        part_s = max(part_s, LEAST_COMPUTED * part_s + cost.kv_token_s * num_done)
        return min(max(self._tokens_within(request.spec.adapter, num_done, part_s), 1), self.budget)

    def keep_for_patient(self, num: int) -> None:
        """Keep what patient prompts may have for a long one that is placed behind the others."""
        self.patient_kept = num
        self.patient_budget -= num

    def give_kept(self) -> None:
        """Let it be placed now."""
        self.patient_budget += self.patient_kept
        self.patient_kept = 0

    def most(self, request: RequestState) -> int:
        """Return the tokens that a prompt may have, whatever others leave."""
        is_limited = request.is_patient and not request.has_turn
        return min(self.budget, self.patient_budget) if is_limited else self.budget

    def readable(self, num_done: int) -> int:
        """Return how many tokens a row with so many in the cache may compute, by what it reads."""
        most = self._budget.max_kv_read
        if most is None or (not self.rows and num_done >= most):
            return self.budget
        return min(max(most - self.kv_read - num_done, 0), self.budget)

    @property
    def limits_reads(self) -> bool:
        """Whether rows may have to take turns in reading the cache."""
        return self._budget.max_kv_read is not None

    def _chunk(self, adapter: AdapterHandle, num_done: int) -> int:
        num = self.budget
        if self.is_paced and self._budget.target_s is not None and self._budget.cost is not None:
            num = min(num, self._tokens_in_time(adapter, num_done))
            if not self.num_prompt_tokens:
                num = max(num, min(LEAST_CHUNK + self.reserved, self.budget))
        return max(num - self.reserved, 0)

    def _tokens_in_time(self, adapter: AdapterHandle, num_done: int) -> int:
        """Return how many tokens more the step can have within its target."""
        cost, target_s = self._budget.cost, self._budget.target_s
        assert cost is not None
        assert target_s is not None
        return self._tokens_within(adapter, num_done, target_s - cost.seconds(self.work))

    def _tokens_within(self, adapter: AdapterHandle, num_done: int, left_s: float) -> int:
        """Return how many tokens of a prompt take so many seconds more, behind those in the cache."""
        cost = self._budget.cost
        assert cost is not None
        left_s -= cost.kv_token_s * num_done
        token_s = cost.token_s + cost.kv_token_s + cost.attended_s * num_done
        if adapter != BASE_ADAPTER:
            record = self._known_adapters[adapter]
            token_s += cost.token_rank_s * record.rank
            if adapter not in self._adapters:
                left_s -= cost.adapter_byte_s * record.nbytes
        if left_s <= 0:
            return 0
        # n tokens attend to n / 2 of themselves each, besides.
        own_s = cost.attended_s / 2
        if (token_s + own_s * self.budget) * self.budget <= left_s:
            return self.budget
        return int(2 * left_s / (token_s + math.sqrt(token_s * token_s + 4 * own_s * left_s)))

    # --- rows -------------------------------------------------------------------------

    def blocks_missing(self, request: RequestState, num: int) -> int:
        """Blocks that ``num`` more tokens need beyond those the request owns (may be < 0)."""
        return -(-(request.num_scheduled + num) // self._block_size) - len(request.blocks)

    def has_blocks(self, request: RequestState, num: int) -> bool:
        """Whether there are blocks for ``num`` more tokens without taking any from others."""
        return self.blocks_missing(request, num) <= self._pool.num_free

    def enter(self, request: RequestState, num: int) -> None:
        """Let a request that was admitted compute its first tokens that are not in the cache."""
        self.plan.new_rows.append(request.as_new_row())
        self.plan.new_blocks += request.blocks
        num_cached = len(request.blocks)
        self.place_prompt(request, num)
        self.plan.num_new_blocks[-1] += num_cached

    def enter_again(self, request: RequestState, num: int) -> None:
        """Let a request that left by no fault of its own compute ``num`` tokens with its blocks."""
        self.plan.new_rows.append(request.as_new_row())
        self.plan.new_blocks += request.blocks
        num_held = len(request.blocks)
        self.place(request, num)
        self.plan.num_new_blocks[-1] += num_held

    def place_prompt(self, request: RequestState, num: int) -> None:
        """Let a request compute ``num`` tokens of what it knows."""
        self.num_prompt_tokens += num
        if not request.is_patient:
            self.has_urgent_prompt = True
        elif not request.has_turn:
            self.patient_budget -= num
        if self._pooled_s is None or not request.spec.output.pools:
            self.place(request, num)
            return
        cost, before = self._budget.cost, self.work
        assert cost is not None
        self.place(request, num)
        self._pooled_s -= cost.seconds(self.work) - cost.seconds(before)

    def place(self, request: RequestState, num: int, num_ahead: int = 0) -> None:
        """Let a request compute ``num`` tokens; budget and blocks for them are there.

        It is granted blocks for ``num_ahead`` more.
        """
        plan = self.plan
        missing = self.blocks_missing(request, num + num_ahead)
        if num_ahead > request.num_ahead:
            request.num_ahead = num_ahead
        if missing > 0:
            taken = self._pool.take(missing, request.terms.tenant)
            request.blocks += taken
            plan.new_blocks += taken
        request.num_scheduled += num
        reports = request.num_scheduled == request.num_tokens + request.num_pending
        request.num_pending += reports
        request.last_step = plan.seq
        plan.row_ids.append(request.request_id)
        plan.num_tokens.append(num)
        plan.num_new_blocks.append(max(missing, 0))
        self.rows.append(PlannedRow(request, request.incarnation, num, reports))
        self.budget -= num
        self.kv_read += request.num_scheduled
        self._attended += num * request.num_scheduled - num * (num - 1) // 2
        adapter = request.spec.adapter
        if adapter != BASE_ADAPTER:
            self._adapters[adapter] = self._adapters.get(adapter, 0) + 1
            self._token_ranks += num * self._known_adapters[adapter].rank

    def decode(self, requests: Sequence[RequestState]) -> None:
        """Let rows compute a token each, in blocks that they have: as ``place``, for most rows."""
        plan, rows, row_ids = self.plan, self.rows, self.plan.row_ids
        seq, kv_read = plan.seq, 0
        for request in requests:
            num_scheduled = request.num_scheduled = request.num_scheduled + 1
            row = request.decode_row
            if num_scheduled != request.num_tokens + request.num_pending:
                row = PlannedRow(request, request.incarnation, 1, reports=False)
            else:
                request.num_pending += 1
                if row is None:
                    row = PlannedRow(request, request.incarnation, 1, reports=True)
                    request.decode_row = row
            request.last_step = seq
            row_ids.append(request.request_id)
            rows.append(row)
            kv_read += num_scheduled
            adapter = request.spec.adapter
            if adapter != BASE_ADAPTER:
                self._adapters[adapter] = self._adapters.get(adapter, 0) + 1
                self._token_ranks += self._known_adapters[adapter].rank
        num = len(requests)
        plan.num_tokens += [1] * num
        plan.num_new_blocks += [0] * num
        self.budget -= num
        self.kv_read += kv_read
        self._attended += kv_read

    # --- a step that is placed ahead ----------------------------------------------------

    def go_on(self, now: float, budget: StepBudget) -> None:
        """Complete it now, with what is known of prices by now."""
        self.now, self._budget = now, budget

    def grant(self) -> None:
        """Give rows that were placed the blocks that they need: there are so many."""
        take, new_blocks = self._pool.take_one, self.plan.new_blocks
        for row in compress(self.rows, self.plan.num_new_blocks):
            request = row.request
            block = take(request.terms.tenant)
            request.blocks.append(block)
            new_blocks.append(block)

    def take_out(self, index: int) -> None:
        """The row of that place, which decodes a token and has no block for it yet, does not."""
        plan, row = self.plan, self.rows.pop(index)
        request = row.request
        del plan.row_ids[index], plan.num_tokens[index], plan.num_new_blocks[index]
        self.budget += 1
        self.kv_read -= request.num_scheduled
        self._attended -= request.num_scheduled
        request.num_scheduled -= 1
        request.num_pending -= row.reports
        adapter = request.spec.adapter
        if adapter != BASE_ADAPTER:
            self._token_ranks -= self._known_adapters[adapter].rank
            self._adapters[adapter] -= 1
            if not self._adapters[adapter]:
                del self._adapters[adapter]
