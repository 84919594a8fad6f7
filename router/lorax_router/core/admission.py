"""Who of those that wait enters a step, and who gives way to them."""

from __future__ import annotations

from lorax_router.core.adapters.activation import Activation
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.request import RequestState
from lorax_router.core.running import RunningRows
from lorax_router.core.step_builder import StepBuilder

# How many waiting requests one plan looks at beyond those it admits.
MAX_LOOKAHEAD = 16
# Tokens that must be on their way for a request to wait for them, if they are half of what it
# would compute.
MIN_AWAITED = 64


class Admission:
    """Asks the policy and knows what fits. Owned by the Scheduler, whose parts it works on."""

    def __init__(
        self,
        policy: SchedulingPolicy,
        running: RunningRows,
        adapters: AdapterTable,
        activation: Activation,
        *,
        block_size: int,
        max_rows: int,
    ) -> None:
        self._policy = policy
        self._running = running
        self._adapters = adapters
        self._activation = activation
        self._block_size = block_size
        self._max_rows = max_rows
        # Whether the round that ``make_place`` looked at is as good as a new one.
        self._has_round = False

    def make_place(self, now: float) -> None:
        """Make rows give way to the first that waits, where the policy says so and it helps."""
        running, policy = self._running, self._policy
        self._has_round = policy.displaces and len(policy) > 0 and len(running) > 0
        if not self._has_round:
            return
        policy.start_round(now, self._adapters.admitting())
        request = policy.head()
        if request is None or request.num_pending or self._has_place(request):
            return
        others = policy.displaced(request, running.requests())
        if running.most_free(others) < self._blocks_needed(request):
            return
        for other in others:
            self._has_round = False
            policy.gives_way(other)
            running.preempt(other, now)
            if self._has_place(request):
                return

    def _has_place(self, request: RequestState) -> bool:
        """Whether a waiting request will find a row and blocks, once steps in flight are done."""
        running = self._running
        return len(running) < self._max_rows and running.most_free() >= self._blocks_needed(request)

    def admit(self, builder: StepBuilder, prompts: list[RequestState]) -> None:
        """Admit waiting requests while rows, tokens and blocks last.

        A request enters only if all its known tokens fit beside what running prompts
        still need and one block of growth for each running row; where the policy reserves,
        if the most that it may need fits beside the most of the others. One that does not
        fit lets a bounded number pass.
        """
        running, policy = self._running, self._policy
        if not (len(policy) and builder.budget and len(running) < self._max_rows):
            return
        room = self._room_beside_running(builder, prompts)
        deferred: list[RequestState] = []
        num_overtaken = num_awaiting = 0
        if not self._has_round:
            policy.start_round(builder.now, self._adapters.admitting())
        while builder.budget and len(running) < self._max_rows:
            if len(deferred) + num_awaiting > MAX_LOOKAHEAD:
                break
            request = policy.head()
            if request is None:
                break
            if request.num_pending:
                policy.deferred(request)
                continue  # preempted with a token, or its end, on its way
            kept = running.kept(request)
            if self._awaits_prefix(request, kept.num_tokens):
                num_awaiting += 1
                policy.deferred(request)
                continue
            needed = self._blocks_needed(request) - running.pool.num_in_use(kept.blocks)
            if needed > (room if len(running) else running.pool.num_free):
                policy.deferred(request)
                deferred.append(request)
                if request.num_bypassed >= policy.max_bypasses:
                    break
                continue
            room -= needed + (not policy.reserves_all)
            num_overtaken = len(deferred)
            running.enter(request, kept, builder.now)
            policy.admitted(request)
            self._activation.need(request.spec.adapter, builder.plan)
            builder.enter(request)
        for request in deferred[:num_overtaken]:
            request.num_bypassed += 1

    def _room_beside_running(self, builder: StepBuilder, prompts: list[RequestState]) -> int:
        """Free blocks less those that are kept for the rows that run."""
        running = self._running
        if self._policy.reserves_all:
            kept = sum(self._blocks_needed(r) - len(r.blocks) for r in running.requests())
        else:
            kept = len(running)
            kept += sum(max(0, builder.blocks_missing(r, r.num_to_schedule)) for r in prompts)
        return running.pool.num_free - kept

    def _blocks_needed(self, request: RequestState) -> int:
        """Blocks that must be free for a request to enter."""
        num = request.num_kv_tokens if self._policy.reserves_all else request.num_tokens
        return -(-num // self._block_size)

    def _awaits_prefix(self, request: RequestState, num_kept: int) -> bool:
        """Whether much of what a request would compute is on its way.

        It waits for a step or two: nobody is admitted before all that runs is planned to the
        end of what it knows, so what others have announced is in flight.
        """
        num_coming = self._running.pool.index.num_coming(request, num_kept // self._block_size)
        num_left = request.num_tokens - num_kept
        return num_coming >= MIN_AWAITED and 2 * num_coming >= num_left
