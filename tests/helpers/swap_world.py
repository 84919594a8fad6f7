"""A scheduler with host memory for blocks, and a shard that checks each block it is given."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

from lorax_contract.step import (
    BlockSpace,
    FinishCode,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.request import ANY_TERMS, RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.memory import FakeMemory
from lorax_router.shards.fake.shard import FakeModel


class FixedCost:
    """Computing a token again takes so many seconds."""

    def __init__(self, token_s: float) -> None:
        self.token_s = token_s

    def recompute_s(self, num_tokens: int) -> float:
        """Return tokens times the price."""
        return num_tokens * self.token_s if num_tokens else 0.0


class EveryThird:
    """Of three answers two are that computing again takes for ever, one that it takes no time."""

    def __init__(self) -> None:
        self._num = 0

    def recompute_s(self, num_tokens: int) -> float:
        """Return what is next."""
        self._num += 1
        return inf if self._num % 3 else 0.0


class PlannedCopies(NamedTuple):
    """Blocks of the pool that a plan copies out and fills, and the host blocks of both."""

    out: set[int]
    brought: set[int]
    host_blocks: set[int]


def copies_of(plan: StepPlan) -> PlannedCopies:
    """Return what a plan moves; it copies between the pool and host memory only."""
    found = PlannedCopies(set(), set(), set())
    for copy in plan.copies:
        goes_out = copy.destination_space == BlockSpace.HOST
        assert goes_out == (copy.source_space == BlockSpace.DEVICE)
        ours, theirs = copy.source_block, copy.destination_block
        if not goes_out:
            ours, theirs = theirs, ours
        (found.out if goes_out else found.brought).add(ours)
        found.host_blocks.add(theirs)
    return found


class SwapWorld:
    """Every token that comes is that of an undisturbed run.

    Args:
        num_blocks, block_size: of the pool.
        num_host_blocks: of host memory.
        token_s: what computing a token again takes.
        block_move_s: what a block takes over the link.
    """

    def __init__(
        self,
        num_blocks: int = 8,
        block_size: int = 4,
        *,
        num_host_blocks: int = 64,
        token_s: float = inf,
        block_move_s: float = 1.0,
        keeps_evicted: bool = False,
        prefix_caching: bool = True,
        policy: SchedulingPolicy | None = None,
        depth: int = 2,
        max_rows: int = 8,
        draft_tokens: int = 0,
    ) -> None:
        self.scheduler = Scheduler(
            num_blocks=num_blocks, block_size=block_size, max_step_tokens=64, max_rows=max_rows,
            depth=depth, policy=policy, prefix_caching=prefix_caching,
            num_host_blocks=num_host_blocks, block_move_s=block_move_s,
            keep_evicted=keeps_evicted,
            recompute=FixedCost(token_s), draft_tokens=draft_tokens,
        )  # fmt: skip
        self.model = FakeModel(vocab_size=1000, eos_token_ids=frozenset())
        self.sizes = num_blocks, block_size
        self.shard = FakeBatch(self.model, FakeMemory(num_blocks, block_size))
        self.plans: deque[StepPlan] = deque()
        self.specs: dict[RequestId, RequestSpec] = {}
        self.received: dict[RequestId, list[int]] = {}
        # Tokens that the steps computed for each request.
        self.computed: dict[RequestId, int] = {}
        self.num_out = self.num_in = self.num_steps = 0
        # Rows with which a pass fails; what is asked of each pass, by its rows; passes that failed.
        self.harmful: set[RequestId] = set()
        self.fails: Callable[[StepPlan], bool] = lambda plan: False
        self.failed: list[StepPlan] = []
        self.executed: list[StepPlan] = []

    def submit(
        self, prompt: Sequence[int], max_new: int, terms: RequestTerms = ANY_TERMS,
        **sampling: bool,
    ) -> RequestId:  # fmt: skip
        """Queue a request."""
        request_id = RequestId(len(self.received) + 1)
        spec = RequestSpec(
            request_id=request_id, prompt_ids=prompt, sampling=SamplingParams(**sampling),
            stopping=StoppingParams(max_new_tokens=max_new),
        )  # fmt: skip
        self.scheduler.submit(spec, 0.0, terms)
        self.specs[request_id], self.received[request_id] = spec, []
        self.computed[request_id] = 0
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        """Let a client leave."""
        self.scheduler.cancel(request_id)
        del self.specs[request_id]

    def step(self) -> None:
        """Plan as far ahead as the scheduler may, execute the oldest plan and book it."""
        while (plan := self.scheduler.plan(0.0)) is not None:
            self.plans.append(plan)
        if not self.plans:
            return
        plan = self.plans.popleft()
        self.num_steps += 1
        for row, num in zip(plan.row_ids, plan.num_tokens, strict=True):
            self.computed[row] += num
        copies = copies_of(plan)
        self.num_out += len(copies.out)
        self.num_in += len(copies.brought)
        harmful = {*self.harmful, *(plan.row_ids if self.fails(plan) else ())}
        outcome = self.shard.execute(plan, {}, {}, harmful=harmful)
        self.executed.append(plan)
        if outcome.failed or FinishCode.ERROR in outcome.finish:
            self.failed.append(plan)
        self._book(outcome)
        self.scheduler.check()

    def _book(self, outcome: StepOutcome) -> None:
        accepted = self.scheduler.apply(outcome, 0.0)
        tokens = iter(outcome.tokens.ids)
        for row, num, finish, counts in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, accepted, strict=True
        ):
            new = [next(tokens) for _ in range(num)]
            if not counts:
                continue
            self.received[row] += new
            wanted = self.model.expected_tokens(self.specs[row])
            assert self.received[row] == wanted[: len(self.received[row])]
            if finish:
                assert finish == FinishCode.ERROR or self.received[row] == wanted
                del self.specs[row]

    def lose_shards(self, num_blocks: int | None = None) -> dict[RequestId, str]:
        """Others, empty, take the place of the shards; return who ends by it, and why."""
        self.plans.clear()
        self.sizes = num_blocks or self.sizes[0], self.sizes[1]
        self.shard = FakeBatch(self.model, FakeMemory(*self.sizes))
        ended = self.scheduler.shards_lost(
            0.0, epoch=self.scheduler.epoch + 1, num_blocks=self.sizes[0], adapter_bytes=None
        ).ended
        for request_id in ended:
            del self.specs[request_id]
        self.scheduler.check()
        return ended

    def run_until(self, num_swaps: int) -> None:
        """Go on until so many requests were swapped out."""
        for _ in range(10_000):
            if self.scheduler.stats().host.num_swaps >= num_swaps:
                return
            self.step()
        raise AssertionError("nobody is swapped out")

    def finish(self, most: int = 20_000) -> None:
        """Let all requests end; nothing is left behind."""
        for _ in range(most):
            if self.scheduler.is_idle:
                break
            self.step()
        assert not self.specs, "requests are left"
        self.is_clean()

    def is_clean(self) -> None:
        """All blocks of both kinds are free."""
        stats = self.scheduler.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert stats.host.num_held == 0

    def load(self, num_requests: int, rng: random.Random) -> None:
        """Queue requests of up to half the pool each."""
        most = self.sizes[0] * self.sizes[1] // 2
        for _ in range(num_requests):
            num_prompt = rng.randint(1, most // 2)
            # Many begin alike.
            start = rng.randrange(3)
            prompt = [start] * min(num_prompt, 6) + [
                rng.randrange(1000) for _ in range(max(0, num_prompt - 6))
            ]
            self.submit(prompt, rng.randint(1, most - num_prompt))
