"""The scheduler: decides what each step computes, and books what it produced.

A step is three verbs, ``plan -> run -> apply``. ``plan`` hands out a budget of tokens: one to each
decoding row, the rest to prompts in chunks. There are no phases: a new prompt, a chunk, a resumed
request and a decode are all "compute the next n tokens" of a request whose computed tokens chase
its known ones.

``prepare`` gives rows that decode their places in the next step while the shards compute, so that
it is ready when their reply comes: it is the same step, for whoever comes or leaves meanwhile.

``plan`` may run up to ``depth`` steps ahead of ``apply``. A row that decodes while its previous
token is still on its way is planned blindly: the shard holds that token. If it turns out to be the
last one, the shard skips the row.

Blocks are granted as tokens arrive. When the pool is dry, the policy's victim gives its blocks back
and waits to be computed again. Rules that keep this live:

1. a row planned in this step is never a victim of it;
2. a row takes memory only from rows that it outranks, and else stands still;
3. nobody is admitted in a step in which a running row stood still or gave way.

The highest-ranking row can always take from the others, and a request that could not run alone in
the empty pool is refused at submission: so some row always moves.

Adapters are prepared and released beside the steps (``adapter_orders``, ``adapter_event``); only
requests whose adapter is resident are candidates, so that a cold or broken one delays nobody else.
An adapter takes effect with the first row that needs it, ceases in a step of its own or another's,
and its memory is released once that step is acknowledged.

A pass that failed computed nothing: its rows are taken out of all steps in flight, and planned
again in halves (``Suspects``). Who was in flight each time that the shards were lost is computed
alone (``Isolation``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial

from lorax_contract.errors import ValidationError
from lorax_contract.step import (
    BASE_ADAPTER,
    AdapterHandle,
    FinishCode,
    RequestId,
    RequestSpec,
    StepOutcome,
    StepPlan,
)
from lorax_router.core.adapters.activation import Activation
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable, Orders
from lorax_router.core.admission import Admission
from lorax_router.core.backlog import Backlog, tokens_of
from lorax_router.core.booking import (
    ProtocolError,
    StepInFlight,
    TokenBook,
    accepted_drafts,
    book_computed,
    reported_rows,
    take_out_failed,
)
from lorax_router.core.composition import StepComposer
from lorax_router.core.cost import CostFit
from lorax_router.core.deadlines import Deadlines
from lorax_router.core.facts import SchedulerFacts
from lorax_router.core.host_tier import HostTier
from lorax_router.core.isolation import Isolation, ShardsLost
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.ranked import FirstComeFirstServed
from lorax_router.core.prefix import BlockNames, PrefixIndex
from lorax_router.core.request import (
    ANY_TERMS,
    RequestState,
    RequestTerms,
    Status,
    refuse_impossible,
    refuse_longer,
)
from lorax_router.core.running import RunningRows
from lorax_router.core.step_builder import StepBudget, StepBuilder
from lorax_router.core.suspects import Suspects
from lorax_router.core.swapping import FittedRecompute, MoveOrCompute, RecomputeCost
from lorax_router.core.turns import AdapterTurns


class Scheduler(SchedulerFacts):
    """Owns all requests and all KV blocks; same calls, same plans.

    Args:
        num_blocks: KV blocks in the pool.
        block_size: tokens per block.
        max_step_tokens: most tokens one step computes; at least ``max_rows``.
        max_rows: most requests that run at once.
        depth: how many plans may be unapplied at once.
        epoch: which incarnation of the shards is planned for, as the launcher counts them.
        policy: order of admission and preemption; first come first served if absent.
        adapters: decides which adapters are on the shards; none are known if absent.
        prefix_caching: keep full blocks and share them with requests that begin alike.
        share_prefixes: do so between tenants, too.
        batching: how prompts and decodes share steps, as StepComposer has it.
        max_waiting_tokens: of ``decode``: steps for which prompts wait.
        max_kv_read: tokens in the cache that the rows of a step attend to together.
        max_partial_prompts: prompts longer than a step that run at once.
        whole_prompts: compute each prompt in one step, as encoders need it.
        target_itl_s: seconds that a step may take while somebody waits for the next token.
        draft_tokens: tokens that the shards may compute of a row beyond what is planned: blocks for
            them are granted ahead while there are plenty.
        block_names: says what blocks hold; their tokens' hashes if absent.
        num_host_blocks: blocks in the host memory of each rank, for those that give way.
        block_move_s: seconds that a block takes to it or from it.
        keep_evicted: keep cached blocks there, too, that the pool needs.
        recompute: what computing tokens again takes; as steps show it if absent.
        max_queued_requests, max_queued_tokens: what may wait for its first step, of all tenants
            together; None: no limit. Those of a tenant come with its requests.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_step_tokens: int,
        max_rows: int,
        depth: int = 2,
        epoch: int = 1,
        policy: SchedulingPolicy | None = None,
        adapters: AdapterTable | None = None,
        prefix_caching: bool = True,
        share_prefixes: bool = False,
        batching: str = "mixed",
        max_waiting_tokens: int = 20,
        max_kv_read: int | None = None,
        max_partial_prompts: int = 1,
        whole_prompts: bool = False,
        target_itl_s: float | None = None,
        draft_tokens: int = 0,
        block_names: BlockNames | None = None,
        num_host_blocks: int = 0,
        block_move_s: float = 0.0,
        keep_evicted: bool = True,
        recompute: RecomputeCost | None = None,
        max_queued_requests: int | None = None,
        max_queued_tokens: int | None = None,
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
        self.max_rows, self._whole_prompts = max_rows, whole_prompts
        self.depth, self.epoch = depth, epoch
        self.adapters = adapters if adapters is not None else AdapterTable(max_resident=1)
        self._policy = policy if policy is not None else FirstComeFirstServed()
        names = block_names or BlockNames(block_size)
        new_index = partial(PrefixIndex, names, is_on=prefix_caching, is_shared=share_prefixes)
        self._cost = CostFit()
        new_tier = None
        if num_host_blocks:
            choice = MoveOrCompute(block_move_s, recompute or FittedRecompute(self._cost))
            new_tier = partial(HostTier, num_host_blocks, choice, keep_evicted)
        self._running = RunningRows(num_blocks, self._policy, self.adapters, new_index, new_tier)
        self._requests: dict[RequestId, RequestState] = {}
        self._in_flight: deque[StepInFlight] = deque()
        self.backlog = Backlog(max_queued_requests, max_queued_tokens)
        self.deadlines = Deadlines(
            self._policy, self._running, self.backlog, max_step_tokens=max_step_tokens
        )
        # The latest time that a call named.
        self._now = 0.0
        self._new_budget = partial(
            StepBudget, max_kv_read=max_kv_read, target_s=target_itl_s, is_whole=whole_prompts
        )
        self._suspects = Suspects(self._running)
        self._isolation = Isolation(
            self._running, self.adapters, self._suspects, depth, self._policy.waiting_for
        )
        self._new_admission = partial(
            Admission, self._policy, self._running, self.adapters, backlog=self.backlog,
            block_size=block_size, max_rows=max_rows, max_partial_prompts=max_partial_prompts,
        )  # fmt: skip
        self._new_composer = partial(
            StepComposer, self._running, block_size=block_size, batching=batching,
            max_waiting_tokens=max_waiting_tokens, limits_reads=max_kv_read is not None,
            num_ahead=draft_tokens + depth - 1 if draft_tokens else 0, suspects=self._suspects,
            isolation=self._isolation,
        )  # fmt: skip
        self._begin_epoch()
        self._tokens = TokenBook(self._requests, self._policy, self.adapters, self._finished)
        self._next_order = 0
        self._num_steps = self._num_drafted = self._num_accepted = 0
        self._turns = AdapterTurns(self._policy, self._running, self.adapters, self._isolation)

    def _begin_epoch(self) -> None:
        """Shards on which no adapter is in effect get steps from the first one on."""
        self._activation = Activation(self.epoch)
        self._admission = self._new_admission(self._activation)
        self._composer = self._new_composer(self._admission)
        self._next_seq = 1

    # --- requests ---------------------------------------------------------------

    def submit(self, spec: RequestSpec, now: float, terms: RequestTerms = ANY_TERMS) -> None:
        """Queue a request; raises ValidationError when it could never run.

        QueueFullError, BusyError: too much waits already. DeadlineError: it would be too late.
        """
        self._now = now
        if spec.request_id in self._requests:
            raise ValueError(f"request id {spec.request_id} is in use")
        if spec.adapter != BASE_ADAPTER and spec.adapter not in self.adapters:
            raise ValueError(f"adapter handle {spec.adapter} is not known")
        self._check_possible(spec)
        self.backlog.check(terms, 1, tokens_of(spec), now)
        record = self.adapters.find(spec.adapter)
        content = record.content if record is not None else ""
        request = RequestState(spec, self._next_order, now, terms, content)
        self.deadlines.watch(request, now)
        self.backlog.joins(request, now)
        self._next_order += 1
        self._requests[spec.request_id] = request
        self._policy.push(request)
        self._running.pool.tenants.allow(terms.tenant, terms.limits.kv_share)
        self.adapters.asked_by(spec.adapter, terms.tenant, terms.limits.adapter_share)
        self.adapters.waits(spec.adapter, now)

    def cancel(self, request_id: RequestId) -> bool:
        """End a request without output; False if it is not known (any more)."""
        if (request := self._requests.get(request_id)) is not None:
            self._end(request)
        return request is not None

    def take_late(self, now: float) -> dict[RequestId, str]:
        """End the requests that are too late, and return those that ended so since it was asked last."""
        self.deadlines.look(now, self._end)
        return self.deadlines.take_late()

    def served_elsewhere(self, amounts: Mapping[str, float]) -> None:
        """Count what other replicas gave tenants since the last call, as ``service_here`` has it."""
        self._policy.served_elsewhere(amounts)

    def service_here(self) -> Mapping[str, float]:
        """Return what each tenant got of this replica so far, in tokens by its weight."""
        return self._policy.service_here()

    def adapter_orders(self) -> Orders:
        """Return what is to be prepared and released beside the steps; each order once."""
        return self._activation.take_orders()

    def adapter_event(
        self, handle: AdapterHandle, event: AdapterEvent, now: float, *, epoch: int, nbytes: int = 0
    ) -> list[RequestId]:
        """Book what came of an order; one of another epoch is void.

        ``nbytes`` is what the adapter takes in truth, if that is known now. Returns the
        requests that end because the order failed.
        """
        if epoch != self.epoch:
            return []
        if nbytes:
            self.adapters.measured(handle, nbytes)
        self.adapters.event(handle, event, now)
        waiting = self._policy.waiting_for(handle) if event is AdapterEvent.FAILED else []
        for request in waiting:
            self._end(request)
        return [each.request_id for each in waiting]

    def shards_lost(
        self,
        now: float,
        *,
        epoch: int,
        num_blocks: int,
        adapter_bytes: int | None,
        is_quiet: bool = True,
    ) -> ShardsLost:
        """Other shards took the place of those planned for: preempt everything, count anew.

        Tokens of steps in flight are lost; they will be computed again. Adapters are prepared again;
        orders on their way are void. Returns the requests that end, and why: the others may have
        less memory, and what can never fit ends; so does what is to blame for the loss.
        ``is_quiet``: nothing else that could be to blame was done beside the steps.
        """
        if epoch == self.epoch:
            raise ValueError(f"epoch {epoch} is planned for already")
        blamed = self._isolation.lost(self._in_flight, is_quiet=is_quiet)
        self._running.take_back()
        self._in_flight.clear()
        for request in self._requests.values():
            request.num_pending = 0
            request.last_step = 0
        self._suspects.forget()
        self.adapters.shards_lost(adapter_bytes)
        self._running.start_anew(num_blocks, now)
        self.epoch = epoch
        self._begin_epoch()
        for request_id in blamed:
            self._end(self._requests[request_id])
        return ShardsLost(blamed, self._end_impossible())

    def _check_possible(self, spec: RequestSpec) -> None:
        """Raise ValidationError for a request that can never run here."""
        if spec.adapter != BASE_ADAPTER:
            self.adapters.check_possible(spec.adapter)
        refuse_impossible(spec, self._running.pool.num_blocks, self.block_size)
        if self._whole_prompts:
            refuse_longer(spec, self.max_step_tokens)

    def _end_impossible(self) -> dict[RequestId, str]:
        """End the requests that can never fit any more; return why each cannot."""
        impossible: dict[RequestId, str] = {}
        for request_id, request in list(self._requests.items()):
            try:
                self._check_possible(request.spec)
            except ValidationError as error:
                impossible[request_id] = str(error)
                self._end(request)
        return impossible

    # --- plan -------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """Decide the next step; None when there is nothing to do or ``depth`` is reached."""
        self._now = now
        self.deadlines.look(now, self._end)
        if len(self._in_flight) >= self.depth:
            return None
        return self._plan(now)

    def prepare(self, now: float) -> None:
        """Give rows that decode their places in the next step while those in flight are computed.

        The next plan is what it would have been: whoever ends, gives way or is cancelled meanwhile
        is taken out, those that come are let in when it is made. Where a row may have to give way
        to one of them, all are taken back, and the step is composed as if nothing was prepared.
        Nothing is done where it could be another one for other reasons.
        """
        running = self._running
        if running.ahead is None and len(self._in_flight) >= self.depth and not len(self._policy):
            running.ahead = self._composer.place_ahead(self._new_builder(now))

    def plan_behind(self, seq: int, ended: Sequence[RequestId], now: float) -> StepPlan | None:
        """Decide the next step before the outcome of the oldest one is applied, which is to follow.

        Step ``seq`` is that one; it told only tokens, and these rows ``ended`` with theirs. None
        where the plan might be another one if it was applied: rows are not placed ahead, somebody
        waits or is to be looked at, adapters come or go, or other cached blocks would make room.
        """
        ahead, step = self._running.ahead, self._in_flight[0] if self._in_flight else None
        if ahead is None or step is None or step.seq != seq:
            return None
        if len(self._policy) or self.deadlines.next_look <= now:
            return None
        requests = [self._requests[each] for each in ended if each in self._requests]
        if not (self.adapters.is_settled and self._running.evicts_alike(step, requests)):
            return None
        self._now = now
        for request in requests:
            self._running.ends_behind(request)
        return self._plan(now)

    def _plan(self, now: float) -> StepPlan | None:
        if (orders := self._turns.plan(now)) is not None:
            self._activation.decided(orders)
        running = self._running
        if running.ahead is not None and not self._admission.may_displace(now):
            ahead, running.ahead = running.ahead, None
            builder = ahead.to_complete(now, self._budget())
            self._composer.complete(builder)
        else:
            running.take_back()
            builder = self._new_builder(now)
            self._composer.compose(builder, is_clear=not self._in_flight)
        return self._finish_plan(builder)

    def _new_builder(self, now: float) -> StepBuilder:
        return StepBuilder(
            self._next_seq, self._budget(), self._running.pool, self.block_size, self.adapters, now
        )

    def _budget(self) -> StepBudget:
        return self._new_budget(self.max_step_tokens, cost=self._cost.cost())

    def _finish_plan(self, builder: StepBuilder) -> StepPlan | None:
        """Put what goes beside the rows into a plan; None if there is nothing in it."""
        running, plan = self._running, builder.plan
        has_news = bool(running.drop) or self._activation.has_news
        if not builder.rows and (not has_news or self._in_flight):
            return None
        plan.drop, running.drop = running.drop, []
        plan.copies = running.take_copies()
        self._activation.write(plan)
        self._next_seq += 1
        self._num_steps += 1
        # Copies take their own time.
        work = builder.work if builder.rows and not plan.copies else None
        self._in_flight.append(StepInFlight(plan.seq, builder.rows, work, builder.now))
        return plan

    # --- apply ------------------------------------------------------------------

    def apply(self, outcome: StepOutcome, now: float) -> list[bool]:
        """Book the outcome of the oldest step in flight.

        Appends tokens, ends requests, frees blocks: the only place that does, but for ``cancel``.
        Returns for each row of the outcome whether it counts; those of ended requests do not.
        """
        if not self._in_flight or self._in_flight[0].seq != outcome.seq:
            expected = self._in_flight[0].seq if self._in_flight else None
            raise ProtocolError(f"outcome of step {outcome.seq} came, {expected} is next")
        if outcome.failed:
            self._running.take_back()
            self._suspects.accuse(take_out_failed(self._in_flight, set(outcome.failed)))
        step = self._in_flight.popleft()
        self._suspects.acquit(step)
        num_tokens, seconds = sum([num for _, _, num, _ in step.rows]), outcome.total_ns / 1e9
        if step.work is not None:
            self._cost.observe(step.work.with_drafts(outcome.num_drafted), seconds)
        worth = self._cost.worth(num_tokens, seconds)
        self._policy.step_done(worth)
        self._turns.earn(worth)
        self.deadlines.step_done(num_tokens, step.planned_at, now)
        self._now = now
        self._num_drafted += outcome.num_drafted
        of_drafts = accepted_drafts(outcome)
        self._num_accepted += sum(of_drafts.values())
        awaited, filled = book_computed(step.rows, of_drafts, self.block_size)
        accepted = self._tokens.book(outcome, now)
        awaited.difference_update(reported_rows(outcome))
        for request in filled:
            # Others find what it computed, if it is still where it was.
            if request.status is Status.RUNNING:
                self._running.pool.index.add(request)
        if awaited:
            raise ProtocolError(
                f"step {step.seq} has neither a token nor an end for requests {sorted(awaited)}"
            )
        self._isolation.acquit(step)
        self._activation.acknowledge(step.seq, outcome.inactive)
        self._running.pool.acknowledge(step.seq)
        return accepted

    def _finished(self, request: RequestState, finish: int) -> None:
        """A request ends with its last token, or by an error; what it computed may be found."""
        if finish != FinishCode.ERROR and request.status is Status.RUNNING:
            self._running.pool.index.add(request)
        self._end(request)

    def _end(self, request: RequestState) -> None:
        """Forget a request wherever it stands and free what it holds."""
        self.backlog.leaves(request, self._now, admitted=False)
        was_running = request.status is Status.RUNNING
        if was_running:
            self._policy.ended(request)
            self._running.leave(request)
        else:
            self._policy.remove(request)
            self._running.forget(request)
        self.adapters.leaves(request.spec.adapter, was_running=was_running)
        request.finish()
        self._isolation.forget(request.request_id)
        del self._requests[request.request_id]
