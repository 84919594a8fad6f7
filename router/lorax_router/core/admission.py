"""Who of those that wait enters a step, and who gives way to them."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_router.core.adapters.activation import Activation
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.backlog import Backlog
from lorax_router.core.host_tier import KeptTokens
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.request import RequestState
from lorax_router.core.running import RunningRows
from lorax_router.core.step_builder import StepBuilder

# How many waiting requests one plan looks at beyond those it admits.
MAX_LOOKAHEAD = 16
# And how many long prompts, which wait for others of their kind, it looks past.
MAX_LONG_LOOKAHEAD = 64
# Tokens that must be on their way for a request to wait for them, if they are half of what it
# would compute.
MIN_AWAITED = 64


@dataclass(slots=True)
class _AdmissionRound:
    """One round of admissions."""

    # Long prompts that run; what makes one so; blocks that those who enter may take, and those
    # that are kept for the growth of rows.
    long: list[RequestState]
    limit: int
    room: int
    growth: int
    # Those that do not fit, and how many of them somebody behind them went past.
    deferred: list[RequestState] = field(default_factory=list)
    num_overtaken: int = 0
    # Those that wait for what others compute, and for long prompts to be done.
    num_awaiting: int = 0
    num_long: int = 0
    # A long prompt that enters, behind the short ones.
    entering: RequestState | None = None

    @property
    def has_looked_enough(self) -> bool:
        """Whether planning would take too long if it looked at more."""
        num_looked = len(self.deferred) + self.num_awaiting
        return num_looked > MAX_LOOKAHEAD or self.num_long > MAX_LONG_LOOKAHEAD


class Admission:
    """Asks the policy and knows what fits. Owned by the Scheduler, whose parts it works on."""

    def __init__(
        self,
        policy: SchedulingPolicy,
        running: RunningRows,
        adapters: AdapterTable,
        activation: Activation,
        *,
        backlog: Backlog,
        block_size: int,
        max_rows: int,
        max_partial_prompts: int,
    ) -> None:
        self._policy = policy
        self._running = running
        self._adapters = adapters
        self._activation = activation
        self._backlog = backlog
        self._block_size = block_size
        self._max_rows = max_rows
        self._max_partial_prompts = max_partial_prompts
        # Who may take what is kept for the growth of others.
        self._entitled: RequestState | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that wait to be admitted."""
        return len(self._policy)

    def may_displace(self, now: float) -> bool:
        """Whether rows may have to give way to the first that waits."""
        policy = self._policy
        if not (policy.displaces and len(policy) and len(self._running)):
            return False
        policy.start_round(now, self._adapters.admitting())
        request = policy.head()
        if request is None or not self._running.is_settled(request):
            return False
        return not self._has_place_beside_all(request)

    def make_place(self, builder: StepBuilder, prompts: list[RequestState]) -> RequestState | None:
        """Make rows give way to the first that waits, where the policy says so and it helps.

        Returns that first one; None where nobody gives way to those who wait.
        """
        self._entitled = None
        if not (self._policy.displaces and len(self._policy) and len(self._running)):
            return None
        builder.has_round = True
        self._policy.start_round(builder.now, self._adapters.admitting())
        request = self._policy.head()
        if request is not None and self._running.is_settled(request):
            self._make_place_for(request, builder, prompts)
        return request

    def _make_place_for(
        self, request: RequestState, builder: StepBuilder, prompts: list[RequestState]
    ) -> None:
        running, policy = self._running, self._policy
        if self._has_place_beside_all(request):
            return
        limit = builder.prompt_limit()
        long = [each for each in prompts if each.num_to_schedule > limit]
        if request.num_tokens > limit and not self._may_be_long(request, long):
            return
        rows, num_blocks = running.requests(), self._blocks_needed(request)
        above = running.above_shares(request, num_blocks)
        is_entitled = running.may_take(request, num_blocks) and policy.is_entitled(request, rows)
        if not (is_entitled or above):
            return
        self._entitled = request
        kept = sum(self._growth_of(each, builder) for each in rows)
        if self._has_place(request, kept):
            return
        others = above
        if is_entitled:
            others = [each for each in policy.displaced(request, rows) if not each.is_suspect]
        if above and not self._suffice(others, request, kept, builder):
            others = above
        if not self._suffice(others, request, kept, builder):
            return
        for other in others:
            kept -= self._growth_of(other, builder)
            builder.has_round = False
            policy.gives_way(other, request)
            running.preempt(other, builder.now)
            if self._has_place(request, kept):
                return

    def _suffice(
        self, others: list[RequestState], request: RequestState, kept: int, builder: StepBuilder
    ) -> bool:
        """Whether there are blocks for a request if some rows give way."""
        left = kept - sum(self._growth_of(each, builder) for each in others)
        return self._running.num_free_without(others) - left >= self._blocks_needed(request)

    def _growth_of(self, request: RequestState, builder: StepBuilder) -> int:
        """Blocks that a row takes for what it knows."""
        return max(builder.blocks_missing(request, request.num_to_schedule), 0)

    def _has_place_beside_all(self, request: RequestState) -> bool:
        """Whether nobody needs to give way to a request, whatever rows take of the step."""
        # They may take a block each, and one more is kept for each.
        return self._has_place(request, 2 * len(self._running))

    def _has_place(self, request: RequestState, kept: int) -> bool:
        """Whether a waiting request will find a row and blocks, once steps in flight are done."""
        running = self._running
        num_free = running.num_free_without() - kept
        return len(running) < self._max_rows and num_free >= self._blocks_needed(request)

    def admit(
        self, builder: StepBuilder, prompts: list[RequestState], long: list[RequestState],
        limit: int,
    ) -> RequestState | None:  # fmt: skip
        """Admit waiting requests while rows, tokens and blocks last.

        A request enters only if all its known tokens fit beside what running prompts
        still need and one block of growth for each running row, which only one that others
        would give way to may take; where the policy reserves, if the most that it may need
        fits beside the most of the others. One that does not fit lets a bounded number pass.

        What computes more than ``limit`` tokens before its first one is long. Where as many
        long prompts run as may, others let all pass that are short: those have no more than
        half of a step's tokens, so those that wait are not kept from their turn. One in a step
        enters, and is returned: it is to be placed behind the short ones.
        """
        policy = self._policy
        if not (len(policy) and self._has_room(builder)):
            return None
        growth = 0 if policy.reserves_all else len(self._running)
        room = self._room_beside_running(builder, prompts) - growth
        this = _AdmissionRound(long, limit, room, growth)
        if not builder.has_round:
            policy.start_round(builder.now, self._adapters.admitting())
        while self._has_room(builder) and not this.has_looked_enough:
            request = policy.head()
            if request is None:
                break
            if not self._running.is_settled(request):
                policy.deferred(request)  # preempted with a token, or its end, on its way
            elif not self._decide(request, builder, this):
                break
        for request in this.deferred[: this.num_overtaken]:
            request.num_bypassed += 1
        return this.entering

    def _decide(self, request: RequestState, builder: StepBuilder, this: _AdmissionRound) -> bool:
        """Admit or defer the head of a round; return whether the round goes on."""
        running, policy = self._running, self._policy
        kept = running.kept(request)
        if self._awaits_prefix(request, kept.num_tokens):
            this.num_awaiting += 1
            policy.deferred(request)
            return True
        is_long = request.num_tokens - kept.num_tokens > this.limit
        if is_long and (this.entering or not self._may_be_long(request, this.long)):
            this.num_long += 1
            policy.deferred(request)
            return policy.max_bypasses > 0
        needed = self._blocks_needed(request) - running.pool.num_in_use(kept.blocks)
        num = builder.chunk(request, kept.num_tokens)
        if is_long:
            num = min(num, builder.long_chunk(request, len(this.long) + 1, kept.num_tokens))
        is_entitled = request is self._entitled or not len(running)
        if not num or needed > this.room + this.growth * is_entitled:
            policy.deferred(request)
            this.deferred.append(request)
            return request.num_bypassed < policy.max_bypasses
        this.room -= needed + (not policy.reserves_all)
        this.num_overtaken = len(this.deferred)
        self._let_in(request, kept, builder)
        request.is_long = is_long
        if not is_long:
            builder.enter(request, num)
            return True
        this.entering = request
        if request.is_patient and not request.has_turn:
            builder.keep_for_patient(num)
        builder.reserved = max(builder.reserved, min(-(-this.limit // 2), num))
        # Those behind it would take what it reads.
        return not builder.limits_reads

    def _let_in(self, request: RequestState, kept: KeptTokens, builder: StepBuilder) -> None:
        self._running.enter(request, kept, builder.now)
        self._backlog.leaves(request, builder.now, admitted=True)
        self._policy.admitted(request)
        self._activation.need(request.spec.adapter, builder.plan)

    def has_room_alone(self, request: RequestState, num_tokens: int) -> bool:
        """Whether a waiting request may be computed so far without taking anything from others."""
        needed = max(self._blocks_needed(request), -(-num_tokens // self._block_size))
        num_free = self._running.num_free_without()
        return len(self._running) < self._max_rows and needed <= num_free

    def enter_alone(self, request: RequestState, builder: StepBuilder) -> None:
        """Let a waiting request into a step in which nobody else is, whoever is before it."""
        kept = self._running.kept(request)
        num = max(builder.chunk(request, kept.num_tokens), 1)
        self._let_in(request, kept, builder)
        request.is_long = False
        builder.enter(request, num)

    def _has_room(self, builder: StepBuilder) -> bool:
        """Whether a step has tokens left for those who wait, and a row."""
        return builder.budget > builder.reserved and len(self._running) < self._max_rows

    def _may_be_long(self, request: RequestState, long: list[RequestState]) -> bool:
        """Whether a long prompt may run beside those that do; more urgent ones need not wait."""
        num_ahead = sum(not self._policy.outranks(request, each) for each in long)
        return num_ahead < self._max_partial_prompts

    def _room_beside_running(self, builder: StepBuilder, prompts: list[RequestState]) -> int:
        """Free blocks less those that rows need for what they know, or may ever need."""
        running = self._running
        if self._policy.reserves_all:
            kept = sum(self._blocks_needed(r) - len(r.blocks) for r in running.requests())
        else:
            kept = sum(max(0, builder.blocks_missing(r, r.num_to_schedule)) for r in prompts)
        return running.pool.num_free - kept

    def _blocks_needed(self, request: RequestState) -> int:
        """Blocks that must be free for a request to enter."""
        num = request.num_kv_tokens if self._policy.reserves_all else request.num_tokens
        return -(-num // self._block_size)

    def _awaits_prefix(self, request: RequestState, num_kept: int) -> bool:
        """Whether much of what a request would compute is on its way.

        It waits for a step or two where that is short: short prompts are in flight before
        anybody is admitted. What is on its way of a long one is computed step by step.
        """
        num_coming = self._running.pool.index.num_coming(request, num_kept // self._block_size)
        num_left = request.num_tokens - num_kept
        return num_coming >= MIN_AWAITED and 2 * num_coming >= num_left
