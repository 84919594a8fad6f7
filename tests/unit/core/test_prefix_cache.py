"""The prefix cache, through a scheduler and a shard that checks what is shared."""

from __future__ import annotations

import os
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from lorax_contract.activation import NEVER
from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterEvent, AdapterTable
from lorax_router.core.policies.fair import FairShare
from lorax_router.core.prefix import BlockNames
from lorax_router.core.request import ANY_TERMS, RequestState, RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.memory import FakeMemory
from lorax_router.shards.fake.shard import FakeModel

NUM_OPERATIONS = int(os.environ.get("LORAX_PREFIX_OPERATIONS", "6000"))
NUM_ADAPTERS = 2


class World:
    """A scheduler and one shard; ``computed`` counts the tokens of each request's steps."""

    def __init__(
        self, num_blocks: int = 400, block_size: int = 16, *, vocab_size: int = 1000, **options: Any
    ) -> None:
        adapters = AdapterTable(max_resident=NUM_ADAPTERS)
        for number in range(1, NUM_ADAPTERS + 1):
            adapters.add(AdapterHandle(number), 1)
        values = {"max_step_tokens": 256, "max_rows": 64, "depth": 2} | options
        self.scheduler = Scheduler(
            num_blocks=num_blocks, block_size=block_size, adapters=adapters, policy=FairShare(),
            **values,
        )  # fmt: skip
        self.model = FakeModel(vocab_size=vocab_size, eos_token_ids=frozenset())
        self.shard = FakeBatch(self.model, FakeMemory(num_blocks, block_size))
        self.plans: deque[StepPlan] = deque()
        self.outcomes: deque[StepOutcome] = deque()
        self.specs: dict[RequestId, RequestSpec] = {}
        self.received: dict[RequestId, list[int]] = {}
        self.computed: dict[RequestId, int] = {}
        self.prepared: dict[AdapterHandle, str] = {}

    def submit(
        self, prompt: Sequence[int], max_new: int = 4, adapter: int = 0,
        terms: RequestTerms = ANY_TERMS, start: int | None = None, **sampling: bool,
    ) -> RequestId:  # fmt: skip
        """Queue a request, whose adapter acts from a position on."""
        request_id = RequestId(len(self.received) + 1)
        spec = RequestSpec(
            request_id=request_id, prompt_ids=prompt, sampling=SamplingParams(**sampling),
            stopping=StoppingParams(max_new_tokens=max_new), adapter=AdapterHandle(adapter),
            adapter_start=start,
        )  # fmt: skip
        self.scheduler.submit(spec, 0.0, terms)
        self.specs[request_id] = spec
        self.received[request_id] = []
        self.computed[request_id] = 0
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        """Let a client leave."""
        self.scheduler.cancel(request_id)
        del self.specs[request_id]

    def plan(self) -> None:
        """Plan once, and carry out the adapters' orders."""
        if (plan := self.scheduler.plan(0.0)) is not None:
            self.plans.append(plan)
            for row, num in zip(plan.row_ids, plan.num_tokens, strict=True):
                self.computed[row] += num
        orders = self.scheduler.adapter_orders()
        for event, handles in (
            (AdapterEvent.PREPARED, orders.prepare),
            (AdapterEvent.RELEASED, orders.release),
        ):
            for handle in handles:
                record = self.scheduler.adapters.find(handle)
                content = record.content if record is not None else ""
                self.prepared[handle] = content or f"content {handle}"
                self.scheduler.adapter_event(handle, event, 0.0, epoch=orders.epoch)

    def run(self) -> None:
        """Execute the oldest plan."""
        self.outcomes.append(self.shard.execute(self.plans.popleft(), self.prepared, {}))

    def apply(self) -> None:
        """Book the oldest outcome; each token is that of an undisturbed run."""
        outcome = self.outcomes.popleft()
        accepted = self.scheduler.apply(outcome, 0.0)
        tokens = iter(outcome.tokens.ids)
        for row, num, finish, counts in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, accepted, strict=True
        ):
            new = [next(tokens) for _ in range(num)]
            if counts:
                self.received[row] += new
                spec = self.specs[row]
                wanted = self.model.expected_tokens(spec)
                assert self.received[row] == wanted[: len(self.received[row])]
                if finish:
                    del self.specs[row]

    def finish(self) -> None:
        """Let all requests end."""
        for _ in range(10_000):
            self.plan()
            while self.plans:
                self.run()
            while self.outcomes:
                self.apply()
            self.scheduler.check()
            if self.scheduler.is_idle:
                return
        raise AssertionError("requests are left")


def numbers(num: int, seed: int) -> list[int]:
    """Return token ids that no other seed begins with."""
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(num)]


def test_a_prompt_that_many_share_is_computed_once() -> None:
    """Thirty-two requests at once, with a beginning of 1,000 tokens and ends of their own."""
    world = World()
    system = numbers(1000, 0)
    requests = [world.submit(system + numbers(20, 1 + each)) for each in range(32)]
    world.finish()
    shared = 1000 // 16 * 16
    for request in requests[1:]:
        assert world.computed[request] == 1020 - shared + 3
    assert world.computed[requests[0]] == 1020 + 3
    assert world.scheduler.stats().num_cached_tokens == 31 * shared


def test_the_second_turn_of_a_chat_computes_what_is_new() -> None:
    """The answer is in the cache as well as the question."""
    world = World()
    first = world.submit(numbers(100, 0), max_new=60)
    world.finish()
    history = numbers(100, 0) + world.received[first]
    second = world.submit(history + numbers(30, 1))
    world.finish()
    # All but the last token of the answer was computed: 159 tokens are 9 full blocks.
    assert world.computed[second] == 190 - 9 * 16 + 3


def test_a_prompt_that_is_all_there_computes_one_block() -> None:
    """Something must be computed to draw a token from."""
    world = World()
    for _ in range(2):
        last = world.submit(numbers(64, 0), max_new=1)
        world.finish()
    assert world.computed[last] == 16


@pytest.mark.parametrize(
    "other",
    [
        {"adapter": 1},
        {"terms": RequestTerms("b")},
        {"terms": RequestTerms(cache_salt="x")},
        {"terms": RequestTerms("y")},
        {"prompt_logprobs": True},
    ],
    ids=["adapter", "tenant", "cache salt", "a tenant of a salt's name", "prompt logprobs"],
)
def test_what_is_shared_with_nobody(other: dict) -> None:
    """Adapters change the values, salts keep tenants apart, a prompt's logprobs are computed."""
    world = World()
    world.submit(numbers(64, 0), terms=RequestTerms(cache_salt="y"))
    world.submit(numbers(64, 0))
    world.finish()
    second = world.submit(numbers(64, 0), **other)
    world.finish()
    assert world.computed[second] == 64 + 3


def test_tenants_share_where_that_is_wanted() -> None:
    """A server of one owner can let all hit what any computed."""
    world = World(share_prefixes=True)
    world.submit(numbers(64, 0), terms=RequestTerms("a"))
    world.finish()
    second = world.submit(numbers(64, 0), terms=RequestTerms("b"))
    world.finish()
    assert world.computed[second] == 16 + 3


def test_a_replaced_adapter_finds_nothing_of_the_one_before() -> None:
    """Its handle is another, whatever its name."""
    world = World()
    world.submit(numbers(64, 0), adapter=1)
    world.finish()
    second = world.submit(numbers(64, 0), adapter=2)
    world.finish()
    assert world.computed[second] == 64 + 3


def test_adapters_that_are_invoked_behind_a_prompt_share_it_with_the_base_and_each_other() -> None:
    """Each begins to act behind 1,000 tokens, which are computed once for all."""
    world = World()
    for handle in range(3, 8):
        world.scheduler.adapters.add(AdapterHandle(handle), 1)
    shared = numbers(1000, 0)
    ends = [numbers(20, each) for each in range(8)]
    requests = [
        world.submit(shared + ends[handle], adapter=handle, start=1003 if handle else None)
        for handle in range(8)
    ]
    world.finish()
    first, *others = (world.computed[request] for request in requests)
    assert first == 1020 + 3
    assert others == [1020 - 62 * 16 + 3] * 7
    # What they computed behind that is each one's own, and found by it.
    again = [
        world.submit(shared + ends[handle], adapter=handle, start=1003) for handle in (1, 2, 3)
    ]
    world.finish()
    assert [world.computed[request] for request in again] == [1020 - 63 * 16 + 3] * 3


@pytest.mark.parametrize("start", [30, 32, 33, 47])
def test_no_block_in_which_an_adapter_acts_is_anybody_elses(start: int) -> None:
    """Not the base's, not another adapter's, nor its own where it acted from elsewhere on."""
    others = [(0, None), (2, start), *((1, start + more) for more in (-16, -1, 1))]
    for adapter, other in others:
        world = World()
        world.submit(numbers(64, 0), adapter=1, start=start)
        world.finish()
        request = world.submit(numbers(64, 0), adapter=adapter, start=other)
        world.finish()
        shared = min(start, other or NEVER) // 16 * 16
        assert world.computed[request] == 64 - shared + 3


def test_an_adapter_that_a_prompt_does_not_invoke_shares_all_with_the_base() -> None:
    """The base computes it, output included."""
    world = World()
    first = world.submit(numbers(64, 0), max_new=40, adapter=1, start=NEVER)
    world.finish()
    history = numbers(64, 0) + world.received[first]
    second = world.submit(history, adapter=2, start=NEVER)
    third = world.submit(history)
    world.finish()
    assert world.computed[second] == world.computed[third] == 104 - 96 + 3


@pytest.mark.parametrize(
    "terms", [RequestTerms("b"), RequestTerms(cache_salt="x")], ids=["tenant", "cache salt"]
)
def test_tenants_share_no_more_of_what_comes_before_an_adapter(terms: RequestTerms) -> None:
    """The time of a hit would tell what others asked, whichever model computed it."""
    world = World()
    world.submit(numbers(64, 0))
    world.finish()
    second = world.submit(numbers(64, 0), adapter=1, start=50, terms=terms)
    world.finish()
    assert world.computed[second] == 64 + 3


def test_an_adapter_that_comes_back_finds_what_it_computed_under_another_handle() -> None:
    """What it computes decides, not how often it was forgotten and made known again."""
    world = World()
    adapters = world.scheduler.adapters
    for handle, content in ((11, "x"), (12, "x"), (13, "y")):
        adapters.add(AdapterHandle(handle), 1, content=content)
    world.submit(numbers(64, 0), adapter=11)
    world.finish()
    adapters.retire(AdapterHandle(11))
    same, other = (world.submit(numbers(64, 0), adapter=handle) for handle in (12, 13))
    world.finish()
    assert world.computed[same] == 16 + 3
    assert world.computed[other] == 64 + 3


def test_whoever_computes_its_prompt_for_its_logprobs_waits_for_nobody() -> None:
    """It would use nothing of what another computes."""
    world = World()
    world.submit(numbers(200, 0))
    asking = world.submit(numbers(200, 0), prompt_logprobs=True)
    world.plan()
    assert world.computed[asking] > 0


class CountingNames(BlockNames):
    """Counts how many blocks were looked at."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.num_looks = 0

    def content(self, request: RequestState, number: int) -> bytes:
        """Return what the block holds."""
        self.num_looks += 1
        return super().content(request, number)


def test_what_was_found_of_a_request_that_waits_is_not_looked_for_in_each_plan() -> None:
    """A plan costs what changed, not the length of what is cached of those who wait."""
    names = CountingNames(16)
    world = World(num_blocks=105, block_names=names)
    world.submit(numbers(1600, 0), max_new=1)
    world.finish()
    running = world.submit(numbers(80, 1), max_new=60)
    # It is looked at in each plan, and does not fit beside the other.
    waiting = world.submit(numbers(1600, 0), max_new=1)
    looks = []
    for _ in range(50):
        world.plan()
        while world.plans:
            world.run()
        while world.outcomes:
            world.apply()
        looks.append(names.num_looks)
    assert world.specs.keys() == {running, waiting}
    # The blocks that the running row fills, and none of the hundred that are waited with.
    assert looks[-1] - looks[1] <= 20
    world.finish()
    assert world.computed[waiting] < 160


def test_a_match_ends_where_its_blocks_were_taken_for_others() -> None:
    """What is remembered of a request that waits is true of the pool as it is."""
    world = World(num_blocks=14, block_size=4, max_rows=1)
    world.submit(numbers(24, 0), max_new=1)
    world.finish()
    # It takes the eight empty blocks, and then some of those that lie in wait for the second.
    world.submit(numbers(16, 1), max_new=30)
    waiting = world.submit(numbers(24, 0), max_new=1)
    world.finish()
    assert 4 < world.computed[waiting] < 24


def test_kept_blocks_are_free_for_others_the_end_of_a_chain_first() -> None:
    """A full cache refuses nobody, and what leads to most is kept longest."""
    world = World(num_blocks=10, block_size=4)
    world.submit(numbers(24, 0), max_new=1)
    world.finish()
    stats = world.scheduler.stats()
    assert (stats.num_cached_blocks, stats.num_free_blocks) == (6, 10)
    world.submit(numbers(28, 1), max_new=1)
    world.finish()
    again = world.submit(numbers(24, 0), max_new=1)
    world.finish()
    # Seven blocks were needed and four were empty: the last three of the six are gone.
    assert world.computed[again] == 24 - 3 * 4


def test_a_request_that_gave_way_goes_on_with_what_is_left_of_its_blocks() -> None:
    """Little is computed twice where memory allows it."""
    world = World(num_blocks=12, block_size=4, max_rows=2)
    first = world.submit(numbers(16, 0), max_new=20)
    second = world.submit(numbers(16, 1), max_new=20)
    world.finish()
    assert world.scheduler.stats().num_preemptions > 0
    assert world.computed[first] == 16 + 19
    assert world.computed[second] < 2 * (16 + 19)


def test_without_it_nothing_is_kept() -> None:
    """As if it were not there."""
    world = World()
    world.scheduler = Scheduler(
        num_blocks=400, block_size=16, max_step_tokens=256, max_rows=64, prefix_caching=False
    )
    for _ in range(2):
        last = world.submit(numbers(64, 0))
        world.finish()
    assert world.computed[last] == 64 + 3
    assert world.scheduler.stats().num_cached_blocks == 0


def test_lost_shards_take_all_blocks_along() -> None:
    """What was cached in a dead process is not found in its successor."""
    world = World()
    world.submit(numbers(64, 0))
    world.finish()
    world.scheduler.shards_lost(0.0, epoch=2, num_blocks=400, adapter_bytes=None)
    world.shard = FakeBatch(world.model, FakeMemory(400, 16))
    second = world.submit(numbers(64, 0))
    world.finish()
    assert world.computed[second] == 64 + 3


@pytest.mark.parametrize("depth", [1, 2])
def test_no_two_requests_ever_share_a_block_that_differs(depth: int) -> None:
    """Random operations over two tokens; the shard compares each shared block with its row."""
    draw = random.Random(depth)
    world = World(18, 2, vocab_size=2, max_step_tokens=12, max_rows=6, depth=depth)
    terms = [RequestTerms(name) for name in ("a", "b")]
    for _ in range(NUM_OPERATIONS):
        operation = draw.random()
        if operation < 0.2 and len(world.specs) < 12:
            prompt = [draw.randrange(2) for _ in range(draw.randint(1, 14))]
            adapter = draw.choice([0, 0, 0, 0, 1, 2])
            # Of half the requests with an adapter the base computes a beginning, or all.
            start = draw.choice([None, draw.randint(0, 14), NEVER]) if adapter else None
            world.submit(prompt, draw.randint(1, 10), adapter, draw.choice(terms), start)
        elif operation < 0.23 and world.specs:
            world.cancel(draw.choice(sorted(world.specs)))
        elif operation < 0.55:
            world.plan()
        elif operation < 0.8 and world.plans:
            world.run()
        elif world.outcomes:
            world.apply()
        world.scheduler.check()
    while world.plans:
        world.run()
    while world.outcomes:
        world.apply()
    world.finish()
    stats = world.scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks
    print("FIGURE depth", depth, stats)
    assert stats.num_cached_tokens > NUM_OPERATIONS // 50
    assert stats.num_preemptions > 0
