"""A scheduler that is turned as the engine loop does it, under all that may happen between two turns."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

from tests.helpers.adapter_errands import AdapterErrands

from lorax_contract.errors import LoraxError
from lorax_contract.step import (
    AdapterHandle,
    BlockCopy,
    BlockId,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.booking import ended_rows, tells_only_tokens
from lorax_router.core.request import RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.settings import CoreSettings, make_scheduler
from lorax_router.core.tenant_limits import TenantLimits
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.memory import FakeMemory
from lorax_router.shards.fake.shard import FakeModel

MODEL = FakeModel(eos_token_ids=frozenset({0}), vocab_size=100)
NUM_ADAPTERS = 4
# What is said before anything else, by so many: prompts that begin alike.
NUM_BEGINNINGS = 4


def drawn_settings(draw: Random, policy: str) -> CoreSettings:
    """Return settings of a small server: rows give way in some, in others there is plenty."""
    block_size = draw.choice([2, 4, 8])
    num_tokens = draw.choice([64, 128, 256, 400, 2000])
    max_rows = draw.choice([3, 6, 10])
    return CoreSettings(
        policy=policy, num_blocks=num_tokens // block_size, block_size=block_size,
        max_step_tokens=max_rows + draw.choice([4, 16, 64]), max_rows=max_rows,
        depth=draw.randint(1, 3),
        prefix_caching=draw.random() < 0.9, share_prefixes=draw.random() < 0.3,
        num_host_blocks=draw.choice([0, 0, 0, 8, 30]), block_move_s=1e-5,
        batching=draw.choice(["mixed"] * 18 + ["prefill", "decode"]),
        max_kv_read=draw.choice([None] * 19 + [50]), max_partial_prompts=draw.choice([1, 2]),
        target_itl_s=draw.choice([None, None, 0.001]),
        draft_tokens=draw.choice([0] * 19 + [2]), max_queued_requests=draw.choice([None, 6]),
        max_resident=draw.choice([1, 2, 4, 4]), cycle_time_s=draw.choice([0.1, 0.5, 2.0]),
    )  # fmt: skip


class EngineTurns:
    """What happens is drawn, all of it by one seed.

    ``told`` is all that the scheduler decided and tells of itself, in turns, but for the names of
    blocks; those are in ``blocks``, plan by plan.

    Args:
        policy: its name.
        seed: of what happens, the settings included.
        prepares: rows have their places in the next step beforehand.
        plans_behind: steps are planned before the outcome is applied, where that may be.
    """

    def __init__(
        self, policy: str, seed: int, *, prepares: bool = False, plans_behind: bool = False
    ) -> None:
        self._draw = Random(seed)
        self._settings = drawn_settings(self._draw, policy)
        self._prepares, self._plans_behind = prepares, plans_behind
        self._scheduler: Scheduler = make_scheduler(self._settings)
        # How much happens, of what, and how often outcomes are not what they should be.
        self._num_acts = self._draw.choice([0.15, 0.4, 1.0])
        self._failures = self._draw.choice([0.0, 0.0, 0.02])
        self._longest = self._draw.choice([30, 60])
        self._plans: deque[StepPlan] = deque()
        self._errands = AdapterErrands(self._draw)
        self._num_requests = 0
        self._now = 0.0
        self._start_shard(self._settings.num_blocks)
        self.told: list[Any] = []
        self.blocks: list[tuple[list[BlockId], list[BlockCopy]]] = []
        self.num_placed_ahead = self.num_behind = 0
        for handle in range(1, NUM_ADAPTERS + 1):
            self._scheduler.adapters.add(AdapterHandle(handle), 1, content=f"content {handle % 3}")

    def _start_shard(self, num_blocks: int) -> None:
        self._shard = FakeBatch(MODEL, FakeMemory(num_blocks, self._settings.block_size))
        self._plans.clear()

    def run(self, num: int) -> None:
        """Turn the loop so often."""
        acts = {
            self._submit: 10, self._cancel: 2, self._adapter_event: 6, self._adapter_wish: 2,
            self._wake: 2, self._hear_of_others: 1, self._lose_shards: 0.05,
        }  # fmt: skip
        for _ in range(num):
            num_acts = int(self._draw.expovariate(1 / self._num_acts))
            for act in self._draw.choices(list(acts), list(acts.values()), k=num_acts):
                self._now += self._draw.random() / 50
                act()
            if self._draw.random() < 0.6:
                self._adapter_event()
            self._reply()
            self._check()

    # --- the engine loop ------------------------------------------------------------

    def _wake(self) -> None:
        """Send what may be sent."""
        while (plan := self._scheduler.plan(self._now)) is not None:
            self._take(plan)
        self.told.append(self._scheduler.take_late(self._now))
        orders = self._scheduler.adapter_orders()
        self.told.append((orders.prepare, orders.release))
        self._errands.take(orders)

    def _take(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        step = self._scheduler._in_flight[-1]
        self.blocks.append(([*plan.new_blocks], [*plan.copies]))
        self.told.append(
            (
                plan.seq, tuple(plan.row_ids), tuple(plan.num_tokens), tuple(plan.num_new_blocks),
                tuple(plan.new_rows), tuple(plan.drop), tuple(plan.activate),
                tuple(plan.deactivate), len(plan.copies), step.work, step.planned_at,
            )
        )  # fmt: skip

    def _reply(self) -> None:
        """The oldest step is done, if there is one; its outcome is booked, and the next one sent."""
        self._now += self._draw.random() / 100
        if self._plans:
            outcome, plan = self._outcome(self._plans.popleft()), None
            if self._plans_behind and tells_only_tokens(outcome):
                ended = ended_rows(outcome)
                plan = self._scheduler.plan_behind(outcome.seq, ended, self._now)
                self._scheduler.check()
            self.told.append(self._scheduler.apply(outcome, self._now))
            if plan is not None:
                self.num_behind += 1
                self._take(plan)
        self._wake()
        if self._prepares:
            self._scheduler.prepare(self._now)
            self.num_placed_ahead += self._scheduler._running.ahead is not None

    def _outcome(self, plan: StepPlan) -> StepOutcome:
        draw, rate = self._draw, self._failures
        failing = {each: "planted" for each in plan.row_ids if draw.random() < rate / 4}
        unable = {each: "planted" for each in plan.activate if draw.random() < rate * 2}
        harmful = plan.row_ids if draw.random() < rate else ()
        outcome = self._shard.execute(plan, self._errands.prepared, failing, unable, harmful)
        outcome.total_ns = 200_000 + 20_000 * sum(plan.num_tokens) + draw.randrange(50_000)
        return outcome

    def _check(self) -> None:
        """All that a scheduler tells of itself is the same in the end of each turn."""
        scheduler = self._scheduler
        scheduler.check()
        self.told.append((scheduler.stats(), dict(scheduler.service_here()), scheduler.groups()))

    # --- what happens meanwhile -------------------------------------------------------

    def _submit(self) -> None:
        draw = self._draw
        self._num_requests += 1
        beginning = [1 + draw.randrange(NUM_BEGINNINGS)] * draw.choice([0, 0, 12, 40])
        is_pooled = draw.random() < 0.1
        max_new = 0 if is_pooled else draw.randint(1, draw.choice([3, self._longest]))
        spec = RequestSpec(
            request_id=RequestId(self._num_requests),
            prompt_ids=beginning + [draw.randrange(100) for _ in range(draw.choice([1, 4, 30]))],
            sampling=SamplingParams(prompt_logprobs=draw.random() < 0.05),
            stopping=StoppingParams(max_new_tokens=max_new),
            adapter=AdapterHandle(draw.choice([0] * 6 + [*range(1, NUM_ADAPTERS + 1)])),
            output=OutputKind.VECTOR if is_pooled else OutputKind.TOKENS,
        )
        tenant = draw.choice("aabc")
        limits = TenantLimits(
            queued_requests=5 if tenant == "b" else None,
            kv_share=0.3 if tenant == "c" else None,
            adapter_share=0.5 if tenant == "c" else None,
        )
        terms = RequestTerms(
            tenant, draw.choice([1.0, 2.5]), draw.randrange(3), draw.choice(["", "", "salt"]),
            self._now + draw.uniform(0.05, 1.0) if draw.random() < 0.3 else float("inf"), limits,
        )  # fmt: skip
        try:
            self._scheduler.submit(spec, self._now, terms)
        except (LoraxError, ValueError) as error:
            self.told.append(repr(error))

    def _cancel(self) -> None:
        if self._num_requests:
            latest = RequestId(max(1, self._num_requests - self._draw.randrange(12)))
            self.told.append(self._scheduler.cancel(latest))

    def _adapter_event(self) -> None:
        if (ended := self._errands.end_one(self._scheduler, self._now)) is not None:
            self.told.append(ended)

    def _adapter_wish(self) -> None:
        """Somebody wants, pins, unpins or removes an adapter; one that was removed comes back."""
        adapters, handle = self._scheduler.adapters, AdapterHandle(self._draw.randint(1, 4))
        if handle not in adapters:
            adapters.add(handle, 1, content=f"content {handle % 3}")
        act = self._draw.randrange(4)
        try:
            if act == 0:
                adapters.want(handle, self._now)
            elif act == 1:
                adapters.unpin(handle)
            elif act == 2:
                adapters.retire(handle)
            else:
                adapters.pin(handle)
        except LoraxError as error:
            self.told.append(repr(error))

    def _hear_of_others(self) -> None:
        """Other servers gave tenants something, too."""
        amounts = {self._draw.choice("abc"): self._draw.uniform(0.0, 200.0)}
        self._scheduler.served_elsewhere(amounts)

    def _lose_shards(self) -> None:
        num_blocks = self._settings.num_blocks
        lost = self._scheduler.shards_lost(
            self._now, epoch=self._scheduler.epoch + 1, num_blocks=num_blocks, adapter_bytes=None
        )
        self.told.append(lost)
        self._errands.prepared.clear()
        self._start_shard(num_blocks)
