"""The requests that run, the KV blocks that they hold, and who gives way when there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorax_contract.step import BlockCopy, RequestId
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.blocks import BlockPool
from lorax_router.core.booking import StepInFlight
from lorax_router.core.host_tier import HostTier, KeptTokens
from lorax_router.core.placed_ahead import PlacedAhead
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.prefix import PrefixIndex
from lorax_router.core.request import RequestState, Status

# Rows that gave way so often are left alone by those who take their share.
MAX_YIELDS = 3


class RunningRows:
    """Owned by the Scheduler.

    Args:
        num_blocks: KV blocks in the pool.
        policy: takes those who give way back into its queue.
        adapters: is told who needs which adapter.
        new_index: makes an index of what the blocks hold.
        new_tier: makes what moves blocks to host memory and back; None: there is none.
    """

    def __init__(
        self,
        num_blocks: int,
        policy: SchedulingPolicy,
        adapters: AdapterTable,
        new_index: Callable[[], PrefixIndex],
        new_tier: Callable[[BlockPool], HostTier] | None = None,
    ) -> None:
        self._new_index = new_index
        self.pool = BlockPool(num_blocks, new_index())
        self.tier = new_tier(self.pool) if new_tier is not None else None
        self.num_preemptions = 0
        # Tokens of all that entered, and those of them that were in the cache.
        self.num_entered_tokens = self.num_cached_tokens = 0
        # Rows that the shards are to forget with the next plan.
        self.drop: list[RequestId] = []
        # And those of them that have not left yet.
        self._ended: set[RequestId] = set()
        self._policy = policy
        self._adapters = adapters
        self._requests: dict[RequestId, RequestState] = {}
        # The next step, if rows that go on have their places in it already: whoever does not is taken
        # out of it.
        self.ahead: PlacedAhead | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def requests(self) -> list[RequestState]:
        """Return those that run, the one admitted longest ago first."""
        return list(self._requests.values())

    def kept(self, request: RequestState) -> KeptTokens:
        """Return what need not be computed of a request that waits."""
        blocks = self.pool.index.match(request)
        if self.tier is None:
            return KeptTokens(blocks, (), len(blocks) * self.pool.index.block_size)
        return self.tier.kept(request, blocks)

    def enter(self, request: RequestState, kept: KeptTokens, now: float) -> None:
        """A request runs from now on, with what is kept of it."""
        request.status = Status.RUNNING
        request.num_bypassed = 0
        if not request.host_blocks:
            self.num_entered_tokens += request.num_tokens
            self.num_cached_tokens += kept.num_tokens
        self.pool.share(kept.blocks)
        blocks = [*kept.blocks]
        if self.tier is not None:
            blocks += self.tier.bring(request, kept)
        request.begin(blocks, len(kept.blocks), kept.num_tokens)
        self.pool.index.announce(request)
        self._requests[request.request_id] = request
        self._adapters.runs(request.spec.adapter, now)

    def leave(self, request: RequestState) -> None:
        """A running request is over: free what it holds."""
        if self.ahead is not None:
            self.ahead.take_out(request)
        del self._requests[request.request_id]
        self._free(request)
        if request.request_id in self._ended:
            self._ended.remove(request.request_id)
        else:
            self.drop.append(request.request_id)

    def ends_behind(self, request: RequestState) -> None:
        """A running request leaves soon, by an outcome that is booked behind the next plan."""
        if self.ahead is not None:
            self.ahead.take_out(request)
        self._ended.add(request.request_id)
        self.drop.append(request.request_id)

    def evicts_alike(self, step: StepInFlight, ended: Sequence[RequestState]) -> bool:
        """Whether the same cached blocks make room for rows placed ahead before a step is booked and after.

        ``ended``: rows that end with that step.
        """
        pool = self.pool
        if self.ahead is None or self.ahead.num_blocks <= pool.num_unused:
            return True
        # Blocks would come free by it, or copies be decided by other prices.
        if ended or pool.num_releasing or self.tier is not None:
            return False
        # Which of two blocks with the same content is found depends on what was first.
        return not any(
            pool.index.has_others(row.request, row.request.num_computed + row.num_tokens)
            for row in step.rows
            if row.request.status is Status.RUNNING and row.request.incarnation == row.incarnation
        )

    def take_back(self) -> None:
        """Nobody goes on in the next step as it was placed ahead: it is planned as a whole."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            ahead.take_back()

    def num_to_compute(self, request: RequestState) -> int:
        """Return how many tokens of a waiting request are neither in the cache nor on their way."""
        index = self.pool.index
        num_kept = self.kept(request).num_tokens
        num_coming = index.num_coming(request, num_kept // index.block_size)
        return request.num_tokens - num_kept - num_coming

    def num_free_without(self, others: Sequence[RequestState] = ()) -> int:
        """Blocks that are free once steps in flight are done and some rows gave way."""
        num_free = self.pool.num_free + self.pool.num_releasing
        return num_free + sum(len(each.blocks) for each in others)

    def may_take(self, request: RequestState, num_blocks: int) -> bool:
        """Whether others may give way to a request: for its tenant's first row, or in its share."""
        tenant = request.terms.tenant
        return not self.pool.tenants.excess(tenant, num_blocks) or all(
            each.terms.tenant != tenant for each in self._requests.values()
        )

    def above_shares(self, request: RequestState, num_blocks: int) -> list[RequestState]:
        """Return the rows that are to give way to a request whose tenant is within its share.

        They are those of tenants above theirs, the latest first, and of each no more than it
        has too much; not those that go before the request by rank, or gave way too often.
        """
        tenants = self.pool.tenants
        if not tenants.shares or tenants.excess(request.terms.tenant, num_blocks):
            return []
        left = {name: excess for name in tenants.shares if (excess := tenants.excess(name))}
        rows = []
        for each in sorted(self._requests.values(), key=lambda each: -each.order) if left else ():
            name = each.terms.tenant
            is_spared = each.rank < request.rank or each.num_preemptions >= MAX_YIELDS
            if left.get(name, 0.0) > 0.0 and not (is_spared or each.is_suspect):
                rows.append(each)
                left[name] -= len(each.blocks)
        return rows

    def make_room(self, request: RequestState, step: int, now: float) -> bool:
        """Have a block free for a running request, preempting if that is allowed.

        False when none is free yet: nobody is left who should give way, or the victims' blocks are
        still touched by a step in flight. Rows that ``step`` computes are no victims.
        """
        pool = self.pool
        while not pool.num_free + pool.num_releasing:
            outranked = [
                other
                for other in self._requests.values()
                if other.last_step != step
                and not other.is_suspect
                and self._policy.outranks(request, other)
            ]
            # Who has more than its share gives way first.
            above = [each for each in outranked if pool.tenants.excess(each.terms.tenant)]
            victim = None
            for some in (above, outranked):
                if some and victim is None:
                    victim = self._policy.victim(request, some, self._requests.values(), self._ease)
            if victim is None:
                return False
            self.preempt(victim, now)
        return pool.num_free > 0

    def _ease(self, request: RequestState) -> int:
        """Return how little a row loses by giving way: 0 is what most rows do.

        Otherwise it is in proportion to what is freed, whoever it is. 1: half of it was copied to
        host memory before, so that only the way back is left. 2: its adapter is about to make room
        for another, so that it gives way all the same.
        """
        if self._adapters.is_draining(request.spec.adapter):
            return 2
        if self.tier is None or not request.blocks:
            return 0
        middle = request.blocks[len(request.blocks) // 2]
        return int(self.pool.index.copy_of(middle) is not None)

    def preempt(self, request: RequestState, now: float) -> None:
        """Have a running request give way; it waits to come back, or to be computed anew."""
        if self.ahead is not None:
            self.ahead.take_out(request)
        if self.tier is not None:
            self.tier.swap_out(request)
        self._vacate(request, now)
        self.drop.append(request.request_id)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def forget(self, request: RequestState) -> None:
        """A waiting request needs nothing of what went to host memory, or is over."""
        if self.tier is not None:
            self.tier.let_go(request)

    def is_settled(self, request: RequestState) -> bool:
        """Whether what is known of a waiting request will not change by steps in flight."""
        # What went to host memory may not have been computed: a step may fail.
        may_differ = request.host_blocks and not self.pool.is_acknowledged(request.last_step)
        return not (request.num_pending or may_differ)

    def take_copies(self) -> list[BlockCopy]:
        """Return the copies for the next plan."""
        return self.tier.take_copies() if self.tier is not None else []

    def start_anew(self, num_blocks: int, now: float) -> None:
        """All that ran wait to be computed anew, on shards that know of none of them."""
        for request in self.requests():
            self._vacate(request, now)
        shares = self.pool.tenants.shares
        self.pool = BlockPool(num_blocks, self._new_index())
        self.pool.tenants.shares.update(shares)
        if self.tier is not None:
            self.tier.start_anew(self.pool)
        self.drop.clear()
        self._ended.clear()

    def _free(self, request: RequestState) -> None:
        self.pool.index.withdraw(request)
        self.pool.release(request.blocks, request.last_step)

    def _vacate(self, request: RequestState, now: float) -> None:
        del self._requests[request.request_id]
        self._free(request)
        request.reset_computed()
        request.status = Status.WAITING
        self._policy.push(request)
        self._adapters.returns(request.spec.adapter, now)

    def check(self) -> None:
        """Raise AssertionError unless each block is free, kept or somebody's."""
        self.pool.check([request.blocks for request in self._requests.values()])
        if self.tier is not None:
            self.tier.check()
