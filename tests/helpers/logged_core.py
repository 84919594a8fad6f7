"""A scheduler under random work of all kinds, for logs of events."""

from __future__ import annotations

import random
from collections import deque

from tests.helpers.adapter_errands import AdapterErrands

from lorax_contract.errors import ValidationError
from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.booking import ended_rows, tells_only_tokens
from lorax_router.core.request import RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.settings import CoreSettings
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.memory import FakeMemory
from lorax_router.shards.fake.shard import FakeModel

MODEL = FakeModel(eos_token_ids=frozenset({0, 1, 2}), vocab_size=100)
NUM_ADAPTERS = 6


def small_settings(policy: str) -> CoreSettings:
    """Return settings under which rows give way and adapters take turns."""
    return CoreSettings(
        policy=policy, num_blocks=40, block_size=4, max_step_tokens=32, max_rows=6,
        max_resident=3, cycle_time_s=0.5,
    )  # fmt: skip


class RandomWork:
    """Everything that an engine loop tells a scheduler, by the dice."""

    def __init__(self, scheduler: Scheduler, settings: CoreSettings, seed: int) -> None:
        self._scheduler = scheduler
        self._settings = settings
        self._draw = random.Random(seed)
        self._plans: deque[StepPlan] = deque()
        self._errands = AdapterErrands(self._draw)
        self._live: set[int] = set()
        self._num_requests = 0
        self._now = 0.0
        self._start_shard(settings.num_blocks)
        for handle in range(1, NUM_ADAPTERS + 1):
            scheduler.adapters.add(AdapterHandle(handle), 1, content=f"content {handle % 4}")

    def _start_shard(self, num_blocks: int) -> None:
        self._shard = FakeBatch(MODEL, FakeMemory(num_blocks, self._settings.block_size))
        self._plans.clear()

    def run(self, num: int) -> None:
        """Let so many things happen."""
        acts = [self._submit, self._cancel, self._plan, self._apply, self._event, self._adapter]
        for number in range(num):
            self._now += self._draw.random() / 10
            self._draw.choices(acts, [6, 1, 8, 8, 4, 1])[0]()
            if number == num // 2:
                self._lose_shards()

    def _submit(self) -> None:
        draw = self._draw
        self._num_requests += 1
        beginning = [draw.randrange(3)] * draw.choice([0, 8, 24])
        spec = RequestSpec(
            request_id=RequestId(self._num_requests),
            prompt_ids=beginning + [draw.randrange(100) for _ in range(draw.randint(1, 12))],
            sampling=SamplingParams(prompt_logprobs=draw.random() < 0.1),
            stopping=StoppingParams(max_new_tokens=draw.choice([1, 4, 20, 1000])),
            adapter=AdapterHandle(draw.choice([0, 0, *range(1, NUM_ADAPTERS + 1)])),
        )
        terms = RequestTerms(
            draw.choice("ab"), draw.choice([1.0, 2.5]), draw.randrange(3), draw.choice(["", "salt"])
        )
        try:
            self._scheduler.submit(spec, self._now, terms)
        except (ValidationError, ValueError):
            return  # it can never fit, or its adapter is gone
        self._live.add(self._num_requests)

    def _cancel(self) -> None:
        if self._live:
            self._scheduler.cancel(RequestId(self._draw.choice(sorted(self._live))))

    def _plan(self) -> None:
        if (plan := self._scheduler.plan(self._now)) is not None:
            self._plans.append(plan)
        self._scheduler.prepare(self._now)
        self._errands.take(self._scheduler.adapter_orders())

    def _apply(self) -> None:
        if self._plans:
            plan = self._plans.popleft()
            harmful = plan.row_ids if self._draw.random() < 0.1 else ()
            outcome = self._shard.execute(plan, self._errands.prepared, {}, harmful=harmful)
            # Steps take some time, which decides what later ones hold where there is a target.
            outcome.total_ns = self._draw.randrange(1, 5_000_000)
            if tells_only_tokens(outcome):
                behind = self._scheduler.plan_behind(plan.seq, ended_rows(outcome), self._now)
                self._plans += [] if behind is None else [behind]
            self._scheduler.apply(outcome, self._now)

    def _event(self) -> None:
        self._errands.end_one(self._scheduler, self._now)

    def _adapter(self) -> None:
        adapters, handle = self._scheduler.adapters, AdapterHandle(self._draw.randint(1, 5))
        if handle not in adapters:
            adapters.add(handle, 1, content=f"content {handle % 4}")
        act = self._draw.randrange(4)
        if act == 0:
            adapters.want(handle, self._now)
        elif act == 1:
            adapters.unpin(handle)
        elif act == 2:
            adapters.retire(handle)
        else:
            try:
                adapters.pin(handle)
            except ValidationError:
                return  # too many are pinned

    def _lose_shards(self) -> None:
        self._scheduler.shards_lost(
            self._now, epoch=self._scheduler.epoch + 1, num_blocks=36, adapter_bytes=None
        )
        self._errands.prepared.clear()
        self._start_shard(36)
