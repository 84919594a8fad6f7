"""The scheduler: decides what each step computes, and books what it produced.

A step is three verbs, ``plan -> run -> apply``. ``plan`` hands out a budget of
tokens: one to each decoding row, the rest to prompts in chunks. There are no
phases: a new prompt, a chunk, a resumed request and a decode are all "compute
the next n tokens" of a request whose computed tokens chase its known ones.

``plan`` may run up to ``depth`` steps ahead of ``apply``. A row that decodes
while its previous token is still on its way is planned blindly: the shard holds
that token. If it turns out to be the last one, the shard skips the row.

Blocks are granted as tokens arrive. When the pool is dry, the policy's victim
gives its blocks back and waits to be computed again. Rules that keep this live:

1. a row planned in this step is never a victim of it;
2. a row takes memory only from rows that it outranks, and else stands still;
3. nobody is admitted in a step in which a running row stood still or gave way.

The highest-ranking row can always take from the others, and a request that could
not run alone in the empty pool is refused at submission: so some row always moves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from lorax_contract.errors import ValidationError
from lorax_contract.step import FinishCode, RequestId, RequestSpec, StepOutcome, StepPlan
from lorax_router.core.blocks import BlockPool
from lorax_router.core.policy import FirstComeFirstServed, QueuePolicy
from lorax_router.core.request import RequestState, Status

# How many later requests may overtake one that does not fit, before all wait for it.
MAX_BYPASSES = 64
# How many waiting requests one plan looks at beyond those it admits.
MAX_LOOKAHEAD = 16


class ProtocolError(Exception):
    """An outcome does not belong to the plans in flight: router and shard disagree."""


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot for metrics."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    num_steps: int


class _PlannedRow(NamedTuple):
    request: RequestState
    incarnation: int
    num_tokens: int
    samples: bool


class _InFlight(NamedTuple):
    seq: int
    rows: list[_PlannedRow]


class Scheduler:
    """Owns all requests and all KV blocks; same calls, same plans.

    Args:
        num_blocks: KV blocks in the pool.
        block_size: tokens per block.
        max_step_tokens: most tokens one step computes; at least ``max_rows``.
        max_rows: most requests that run at once.
        depth: how many plans may be unapplied at once.
        policy: order of admission and preemption; first come first served if absent.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_step_tokens: int,
        max_rows: int,
        depth: int = 2,
        policy: QueuePolicy | None = None,
    ) -> None:
        least = min(num_blocks, block_size, max_rows, depth)
        if least < 1:
            raise ValueError("num_blocks, block_size, max_rows and depth must be at least 1")
        if max_step_tokens < max_rows:
            raise ValueError(
                f"max_step_tokens ({max_step_tokens}) must be at least max_rows ({max_rows}): "
                "each running row may decode one token in a step"
            )
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.max_rows = max_rows
        self.depth = depth
        self._policy = policy if policy is not None else FirstComeFirstServed()
        self._pool = BlockPool(num_blocks)
        self._requests: dict[RequestId, RequestState] = {}
        self._running: dict[RequestId, RequestState] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._drop: list[RequestId] = []
        self._next_seq = 1
        self._next_order = 0
        self._num_preemptions = 0
        self._num_steps = 0

    # --- requests ---------------------------------------------------------------

    def submit(self, spec: RequestSpec, now: float) -> None:
        """Queue a request; raises ValidationError when it could never run."""
        if spec.request_id in self._requests:
            raise ValueError(f"request id {spec.request_id} is in use")
        self._refuse_impossible(spec)
        request = RequestState(spec, self._next_order, now)
        self._next_order += 1
        self._requests[spec.request_id] = request
        self._policy.push(request)

    def cancel(self, request_id: RequestId) -> bool:
        """End a request without output; False if it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request)
        return True

    def shards_lost(self) -> list[RequestId]:
        """The shards lost their memory: preempt everything and count steps anew.

        Tokens of steps in flight are lost; they will be computed again. Returns the
        requests that were in a step that nobody acknowledged.
        """
        suspects = [row.request for step in self._in_flight for row in step.rows]
        self._in_flight.clear()
        for request in self._requests.values():
            request.num_pending = 0
            request.last_step = 0
        for request in list(self._running.values()):
            self._vacate(request)
        self._pool = BlockPool(self._pool.num_blocks)
        self._drop.clear()
        self._next_seq = 1
        return sorted({r.request_id for r in suspects if r.status is not Status.FINISHED})

    @property
    def num_in_flight(self) -> int:
        """Plans that are not applied yet."""
        return len(self._in_flight)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to plan and nothing in flight."""
        return not (self._requests or self._in_flight or self._drop)

    # --- plan -------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """Decide the next step; None when there is nothing to do or ``depth`` is reached."""
        if len(self._in_flight) >= self.depth:
            return None
        plan = StepPlan(seq=self._next_seq)
        rows: list[_PlannedRow] = []
        num_preemptions = self._num_preemptions
        budget, chunked, stalled = self._plan_decodes(plan, rows)
        budget, stalled = self._plan_chunks(plan, rows, chunked, budget, stalled)
        if not stalled and self._num_preemptions == num_preemptions:
            self._plan_admissions(plan, rows, chunked, budget, now)
        if not rows and (not self._drop or self._in_flight):
            return None
        plan.drop, self._drop = self._drop, []
        self._next_seq += 1
        self._num_steps += 1
        self._in_flight.append(_InFlight(plan.seq, rows))
        return plan

    def _plan_decodes(
        self, plan: StepPlan, rows: list[_PlannedRow]
    ) -> tuple[int, list[RequestState], bool]:
        """Give one token to each row that has just one to compute.

        Returns the budget left, the rows that have more to compute, and whether a row
        stood still for want of a block.
        """
        budget = self.max_step_tokens
        block_size = self.block_size
        chunked: list[RequestState] = []
        stalled = False
        for request in list(self._running.values()):
            num = request.num_to_schedule
            if num > 1:
                chunked.append(request)
            elif num == 1 and request.status is Status.RUNNING:
                if request.num_scheduled == len(request.blocks) * block_size and not (
                    self._make_room(request, 1, plan.seq)
                ):
                    stalled = True
                    continue
                self._place(plan, rows, request, 1)
                budget -= 1
        return budget, chunked, stalled

    def _plan_chunks(
        self,
        plan: StepPlan,
        rows: list[_PlannedRow],
        chunked: list[RequestState],
        budget: int,
        stalled: bool,
    ) -> tuple[int, bool]:
        """Spend the budget on running rows whose prompt is not computed yet."""
        for request in chunked:
            if budget == 0:
                break
            if request.status is not Status.RUNNING:
                continue
            num = min(budget, request.num_to_schedule)
            missing = self._blocks_missing(request, num)
            if missing > self._pool.num_free:
                # Less than a whole chunk is better than standing still.
                room = (len(request.blocks) + self._pool.num_free) * self.block_size
                num = min(num, room - request.num_scheduled)
                if num == 0:
                    if not self._make_room(request, 1, plan.seq):
                        stalled = True
                        continue
                    num = min(budget, request.num_to_schedule, self.block_size)
            self._place(plan, rows, request, num)
            budget -= num
        return budget, stalled

    def _plan_admissions(
        self,
        plan: StepPlan,
        rows: list[_PlannedRow],
        chunked: list[RequestState],
        budget: int,
        now: float,
    ) -> None:
        """Admit waiting requests while rows, tokens and blocks last.

        A request enters only if all its known tokens fit beside what running prompts
        still need and one block of growth for each running row. One that does not fit
        lets a bounded number pass.
        """
        admitted: list[tuple[RequestState, int]] = []
        skipped: list[RequestState] = []
        num_overtaken = 0
        free_rows = self.max_rows - len(self._running)
        # What is left for newcomers once each running and admitted row may grow a block.
        room = self._pool.num_free - len(self._running)
        room -= sum(max(0, self._blocks_missing(r, r.num_to_schedule)) for r in chunked)
        for request in self._policy.candidates(now):
            if budget == 0 or len(admitted) == free_rows or len(skipped) > MAX_LOOKAHEAD:
                break
            if request.num_pending:
                continue  # preempted with a token on its way
            needed = -(-request.num_tokens // self.block_size)
            alone = not (self._running or admitted)
            if needed > (self._pool.num_free if alone else room):
                skipped.append(request)
                if request.num_bypassed >= MAX_BYPASSES:
                    break
                continue
            num = min(budget, request.num_tokens)
            admitted.append((request, num))
            num_overtaken = len(skipped)
            room -= needed + 1
            budget -= num
        for request in skipped[:num_overtaken]:
            request.num_bypassed += 1
        for request, num in admitted:
            self._admit(plan, rows, request, num)

    def _admit(
        self, plan: StepPlan, rows: list[_PlannedRow], request: RequestState, num: int
    ) -> None:
        self._policy.remove(request)
        request.status = Status.RUNNING
        request.num_bypassed = 0
        self._running[request.request_id] = request
        plan.new_rows.append(request.as_new_row())
        self._place(plan, rows, request, num)

    def _place(
        self, plan: StepPlan, rows: list[_PlannedRow], request: RequestState, num: int
    ) -> None:
        """Write one row into the plan; its blocks are there to be taken."""
        missing = self._blocks_missing(request, num)
        if missing > 0:
            taken = self._pool.take(missing)
            request.blocks += taken
            plan.new_blocks += taken
        request.num_scheduled += num
        samples = request.num_scheduled == request.num_tokens + request.num_pending
        request.num_pending += samples
        request.last_step = request.planned_in = plan.seq
        plan.row_ids.append(request.request_id)
        plan.num_tokens.append(num)
        plan.num_new_blocks.append(max(missing, 0))
        rows.append(_PlannedRow(request, request.incarnation, num, samples))

    def _blocks_missing(self, request: RequestState, num: int) -> int:
        """Blocks that ``num`` more tokens need beyond those the request owns (may be < 0)."""
        return -(-(request.num_scheduled + num) // self.block_size) - len(request.blocks)

    def _make_room(self, request: RequestState, num: int, seq: int) -> bool:
        """Have ``num`` blocks free for a running request, preempting if that is allowed.

        False when they are not free yet: no victim is left, or the victims' blocks
        are still touched by a step in flight.
        """
        pool = self._pool
        while pool.num_free + pool.num_releasing < num:
            victims = [
                other
                for other in self._running.values()
                if other.planned_in != seq and self._policy.outranks(request, other)
            ]
            if not victims:
                return False
            self._preempt(self._policy.victim(victims))
        return pool.num_free >= num

    def _preempt(self, request: RequestState) -> None:
        self._vacate(request)
        self._drop.append(request.request_id)
        request.num_preemptions += 1
        self._num_preemptions += 1

    def _vacate(self, request: RequestState) -> None:
        """Take a running request's blocks and queue it again, to be computed anew."""
        del self._running[request.request_id]
        self._pool.release(request.blocks, request.last_step)
        request.reset_computed()
        request.status = Status.WAITING
        self._policy.push(request)

    # --- apply ------------------------------------------------------------------

    def apply(self, outcome: StepOutcome, now: float) -> list[bool]:
        """Book the outcome of the oldest step in flight.

        Appends tokens, ends requests, frees blocks: the only place that does, but for
        ``cancel``. Returns for each row of the outcome whether it counts; rows of
        requests that ended earlier do not.
        """
        if not self._in_flight or self._in_flight[0].seq != outcome.seq:
            expected = self._in_flight[0].seq if self._in_flight else None
            raise ProtocolError(f"outcome of step {outcome.seq} came, {expected} is next")
        step = self._in_flight.popleft()
        awaited = self._book_computed(step.rows)
        accepted = self._book_tokens(outcome, awaited)
        if awaited:
            raise ProtocolError(f"step {step.seq} has no token for requests {sorted(awaited)}")
        self._pool.acknowledge(step.seq)
        return accepted

    def _book_computed(self, rows: list[_PlannedRow]) -> set[RequestId]:
        """Advance the rows that are still where they were; return who must get a token."""
        awaited: set[RequestId] = set()
        for request, incarnation, num, samples in rows:
            if request.status is Status.FINISHED:
                continue
            if request.incarnation == incarnation:
                request.num_computed += num
            if samples:
                request.num_pending -= 1
                awaited.add(request.request_id)
        return awaited

    def _book_tokens(self, outcome: StepOutcome, awaited: set[RequestId]) -> list[bool]:
        """Append tokens and end requests; takes those who got theirs out of ``awaited``."""
        accepted: list[bool] = []
        start = 0
        ids = outcome.tokens.ids
        for row_id, num, finish in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, strict=True
        ):
            stop = start + num
            request = self._requests.get(row_id)
            accepted.append(request is not None)
            if request is not None:
                request.output_ids += ids[start:stop]
                request.num_tokens += num
                if num or finish:
                    awaited.discard(row_id)
                if finish != FinishCode.RUNNING:
                    self._end(request)
            start = stop
        return accepted

    def _end(self, request: RequestState) -> None:
        """Forget a request wherever it stands and free what it holds."""
        if request.status is Status.WAITING:
            self._policy.remove(request)
        else:
            del self._running[request.request_id]
            self._pool.release(request.blocks, request.last_step)
            self._drop.append(request.request_id)
        request.status = Status.FINISHED
        request.blocks = []
        del self._requests[request.request_id]

    # --- facts ------------------------------------------------------------------

    def _refuse_impossible(self, spec: RequestSpec) -> None:
        if not spec.prompt_ids:
            raise ValidationError("`inputs` must have at least one token")
        if spec.stopping.max_new_tokens < 1:
            raise ValidationError("`max_new_tokens` must be at least 1")
        # The last token is never computed, so it needs no room.
        num_kv = len(spec.prompt_ids) + spec.stopping.max_new_tokens - 1
        room = self._pool.num_blocks * self.block_size
        if -(-num_kv // self.block_size) > self._pool.num_blocks:
            raise ValidationError(
                f"{len(spec.prompt_ids)} prompt tokens and {spec.stopping.max_new_tokens} new "
                f"tokens need more than the {room} tokens that the KV cache holds; "
                "shorten the prompt or lower `max_new_tokens`"
            )

    def stats(self) -> SchedulerStats:
        """Return a snapshot for metrics."""
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._policy),
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free + self._pool.num_releasing,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
        )

    def check(self) -> None:
        """Raise AssertionError if an invariant broke: O(requests + blocks), for tests and idle."""
        running = list(self._running.values())
        self._pool.check([block for request in running for block in request.blocks])
        if len(self._running) + len(self._policy) != len(self._requests):
            raise AssertionError("a request is neither running nor waiting, or both")
        if len(running) > self.max_rows or len(self._in_flight) > self.depth:
            raise AssertionError("more rows or steps than allowed")
        pending: dict[RequestId, int] = {}
        for step in self._in_flight:
            for row in step.rows:
                if row.samples:
                    row_id = row.request.request_id
                    pending[row_id] = pending.get(row_id, 0) + 1
        for request in self._requests.values():
            self._check_request(request, pending.get(request.request_id, 0))

    def _check_request(self, request: RequestState, num_pending: int) -> None:
        known = len(request.spec.prompt_ids) + len(request.output_ids)
        room = len(request.blocks) * self.block_size
        facts = {
            "known tokens": request.num_tokens == known,
            "pending tokens": request.num_pending == num_pending,
            "computed <= scheduled": request.num_computed <= request.num_scheduled,
            "scheduled <= known + pending": request.num_scheduled <= known + num_pending,
            "scheduled tokens have blocks": request.num_scheduled <= room,
            "no block too many": room - request.num_scheduled < self.block_size,
            "output limit": len(request.output_ids) + num_pending <= request.max_new_tokens,
            "waiting holds nothing": request.status is Status.RUNNING or room == 0,
        }
        if broken := [name for name, holds in facts.items() if not holds]:
            raise AssertionError(f"request {request.request_id}: {', '.join(broken)}")
