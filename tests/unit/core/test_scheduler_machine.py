"""A state machine drives the scheduler against a fake shard with real block memory.

Tiny pool, tiny vocabulary: collisions, preemptions and stalls are common. After each
call ``check()`` runs; every finished request must have exactly the tokens of an
undisturbed run, whatever happened on its way.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.helpers.core_policies import NUM_ADAPTERS, POLICIES, make_table
from tests.helpers.drawn_requests import REQUESTS
from tests.helpers.limited_tenants import MAX_QUEUED, verify_depths, verify_refusal
from tests.helpers.rare_events import verify_rare_events
from tests.helpers.swap_world import EveryThird
from tests.helpers.touched_blocks import TouchedBlocks

from lorax_contract.errors import BusyError, DeadlineError, QueueFullError, ValidationError
from lorax_contract.step import (
    BASE_ADAPTER,
    AdapterHandle,
    FinishCode,
    OutputKind,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
)
from lorax_router.core.adapters.table import AdapterEvent, AdapterState
from lorax_router.core.booking import ended_rows, tells_only_tokens
from lorax_router.core.request import RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.shards.fake.batch import FakeBatch
from lorax_router.shards.fake.memory import FakeMemory
from lorax_router.shards.fake.shard import FakeModel

STEPS_PER_EXAMPLE = 50
NUM_STEPS = int(os.environ.get("LORAX_MACHINE_STEPS", "1500"))
# What is drawn depends on the modules that are loaded beside: rare events come in long runs only.
MANY_STEPS = 10_000
# One token in 20 is an EOS; whatever else, a token depends on all blocks read back.
MODEL = FakeModel(vocab_size=20)


def make_shard(num_blocks: int, block_size: int) -> FakeBatch:
    """Return an empty shard."""
    return FakeBatch(MODEL, FakeMemory(num_blocks, block_size))


class SchedulerMachine(RuleBasedStateMachine):
    """Submit, cancel, plan, run, apply, fail rows and passes, lose the shards, wait for adapters,
    which fail or give way to others: in any order.
    """

    depth = 1
    policy = "fcfs"
    num_host_blocks = 0
    counts: dict[str, int] = {}
    # What a step may take, as parameters of the scheduler.
    limits: dict[str, Any] = {}

    @initialize(
        num_blocks=st.integers(2, 9),
        block_size=st.integers(1, 4),
        max_rows=st.integers(1, 5),
        extra_tokens=st.integers(0, 6),
        num_slots=st.integers(1, 2),
        activations_per_failure=st.integers(2, 6),
        passes_per_failure=st.integers(2, 12),
        few_host_blocks=st.integers(0, 8),
        keeps_evicted=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        max_rows: int,
        extra_tokens: int,
        num_slots: int,
        activations_per_failure: int,
        passes_per_failure: int,
        few_host_blocks: int,
        keeps_evicted: bool,
    ) -> None:
        """Make a scheduler and its shard."""
        self.sizes = (num_blocks, block_size)
        self.num_host_blocks = max(0, self.num_host_blocks - few_host_blocks)
        adapters = make_table(num_slots)
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_step_tokens=max_rows + extra_tokens,
            max_rows=max_rows,
            depth=self.depth,
            adapters=adapters,
            policy=POLICIES[self.policy](adapters),
            num_host_blocks=self.num_host_blocks,
            keep_evicted=keeps_evicted,
            recompute=EveryThird(),
            **self.limits,
            max_queued_requests=MAX_QUEUED,
        )
        # Of those that may wait for their first step: who asked, and with how many tokens.
        self.terms: dict[RequestId, RequestTerms] = {}
        self.now = 0.0
        self.epoch, self.max_bytes = 1, 6
        # Adapters in the shard's memory, and orders that are being carried out.
        self.prepared: dict[AdapterHandle, str] = {}
        self.orders: list[tuple[AdapterHandle, AdapterEvent, int]] = []
        self.shard = make_shard(*self.sizes)
        self.plans: deque[StepPlan] = deque()
        self.outcomes: deque[StepOutcome] = deque()
        # The handles that new requests get; a name that is replaced gets a new one.
        self.handles = [AdapterHandle(number) for number in range(NUM_ADAPTERS + 1)]
        self.specs: dict[RequestId, RequestSpec] = {}
        self.received: dict[RequestId, list[int]] = {}
        self.next_id = 1
        self.failing: set[RequestId] = set()
        # Rows with which a pass fails; of so many passes one does whoever is in it.
        self.harmful: set[RequestId] = set()
        self.num_passes, self.passes_per_failure = 0, passes_per_failure
        # Of so many activations one fails, though the adapter is prepared.
        self.num_activations, self.activations_per_failure = 0, activations_per_failure
        # Adapters that are known not to have taken effect.
        self.inactive: set[AdapterHandle] = set()
        self.touched = TouchedBlocks(self.sizes[1], self.num_host_blocks, self.counts)
        self.turns_ahead = passes_per_failure % 2 == 0

    @rule(requests=REQUESTS)
    def submit(self, requests: list[tuple[list[int], int, int, RequestTerms, int | None]]) -> None:
        """Clients ask, some for no tokens; what can never fit is refused."""
        for prompt, max_new, adapter, terms, seconds in requests:
            if seconds is not None:
                terms = replace(terms, deadline=self.now + seconds)
            self._submit(prompt, max_new, self.handles[adapter], terms)

    def _submit(
        self, prompt: list[int], max_new: int, adapter: AdapterHandle, terms: RequestTerms
    ) -> None:
        spec = RequestSpec(
            request_id=RequestId(self.next_id),
            prompt_ids=prompt,
            sampling=SamplingParams(),
            stopping=StoppingParams(max_new_tokens=max_new),
            adapter=adapter,
            output=OutputKind.TOKENS
            if max_new
            else (OutputKind.PROMPT, OutputKind.VECTOR)[self.next_id % 2],
        )
        self.next_id += 1
        num_blocks, block_size = self.sizes
        fits = len(prompt) + max(max_new - 1, 0) <= num_blocks * block_size
        try:
            self.scheduler.submit(spec, self.now, terms)
        except ValidationError:
            assert not fits or not self._may_fit(adapter)
            return
        except (QueueFullError, BusyError) as error:
            depths = self.scheduler.stats().queue_depths
            verify_refusal(error, depths, terms.tenant, len(prompt) + max_new)
            self.counts["refused"] = self.counts.get("refused", 0) + 1
            return
        except DeadlineError:
            assert terms.deadline < float("inf")
            self.counts["late"] = self.counts.get("late", 0) + 1
            return
        assert fits
        self.specs[spec.request_id] = spec
        self.terms[spec.request_id] = terms
        self.received[spec.request_id] = []

    @precondition(lambda self: self.specs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A client leaves."""
        request_id = data.draw(st.sampled_from(sorted(self.specs)))
        assert self.scheduler.cancel(request_id)
        del self.specs[request_id]

    @precondition(lambda self: self.specs)
    @rule(data=st.data(), fails=st.sampled_from(["row", "passes"]))
    def fail(self, data: st.DataObject, fails: str) -> None:
        """The shard will find something wrong with a row, or fail in each pass with it."""
        failing = self.failing if fails == "row" else self.harmful
        failing.add(data.draw(st.sampled_from(sorted(self.specs))))

    @rule()
    def plan(self) -> None:
        """The engine loop asks for a plan."""
        before = self.scheduler.stats().num_preemptions
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        self._take_late()
        self._take_orders()
        gave_way = self.scheduler.stats().num_preemptions - before
        self.counts["preemptions"] = self.counts.get("preemptions", 0) + gave_way
        if plan is not None:
            self._planned(plan)

    def _planned(self, plan: StepPlan) -> None:
        self.counts["plans"] = self.counts.get("plans", 0) + 1
        self.plans.append(plan)
        self.touched.planned(plan)
        self._note_activations(plan)

    def _take_late(self) -> None:
        """Whoever ends has a deadline; whoever is past it ends."""
        for request_id in self.scheduler.deadlines.take_late():
            assert self.terms[request_id].deadline < float("inf")
            del self.specs[request_id]
            self.counts["late"] = self.counts.get("late", 0) + 1
        assert all(self.terms[each].deadline > self.now for each in self.specs)

    def _note_activations(self, plan: StepPlan) -> None:
        """What is known not to be in effect is activated again before a row needs it."""
        self.inactive.difference_update(plan.activate)
        assert not self.inactive & {new.spec.adapter for new in plan.new_rows}

    def _take_orders(self) -> None:
        orders = self.scheduler.adapter_orders()
        assert not self.shard.active & {*orders.release}, "released while in effect"
        epoch = orders.epoch
        self.orders += [(handle, AdapterEvent.PREPARED, epoch) for handle in orders.prepare]
        self.orders += [(handle, AdapterEvent.RELEASED, epoch) for handle in orders.release]

    @precondition(lambda self: self.orders)
    @rule(index=st.integers(0, 9), fails=st.integers(0, 3))
    def settle(self, index: int, fails: int = 1) -> None:
        """An order was carried out; one preparation in four fails."""
        handle, event, epoch = self.orders.pop(index % len(self.orders))
        nbytes = 0
        if event is AdapterEvent.PREPARED and not fails:
            event = AdapterEvent.FAILED
        elif epoch == self.epoch and event is AdapterEvent.PREPARED:
            self.prepared[handle] = f"content {handle}"
            # Never more than what was known before.
            nbytes = min(2, self.scheduler.adapters[handle].nbytes)
        elif epoch == self.epoch:
            self.prepared.pop(handle, None)
        for request_id in self.scheduler.adapter_event(
            handle, event, self.now, epoch=epoch, nbytes=nbytes
        ):
            assert self.specs[request_id].adapter == handle
            del self.specs[request_id]
        self.counts["adapters"] = self.counts.get("adapters", 0) + 1

    @rule(index=st.integers(1, NUM_ADAPTERS))
    def replace(self, index: int) -> None:
        """A name leads to another content: the old handle serves those who have it, then goes."""
        self.scheduler.adapters.retire(self.handles[index])
        self.handles[index] = AdapterHandle(self.handles[index] + NUM_ADAPTERS)
        self.scheduler.adapters.add(self.handles[index], nbytes=min(3, self.max_bytes))

    @rule(index=st.integers(1, NUM_ADAPTERS))
    def call(self, index: int) -> None:
        """An adapter is wanted without a request."""
        handle = self.handles[index]
        if self._may_fit(handle):
            self.scheduler.adapters.want(handle, self.now)

    def _may_fit(self, handle: AdapterHandle) -> bool:
        if handle == BASE_ADAPTER:
            return True
        if handle not in self.scheduler.adapters:
            return False  # retired, and gone with the last request for it
        try:
            self.scheduler.adapters.check_possible(handle)
        except ValidationError:
            return False
        return True

    @rule(index=st.integers(1, NUM_ADAPTERS), stays=st.booleans())
    def pin(self, index: int, stays: bool) -> None:
        """An adapter is pinned, if that leaves a slot for others, or unpinned."""
        adapters = self.scheduler.adapters
        if not stays:
            adapters.unpin(self.handles[index])
            return
        others = [r for r in adapters.snapshot() if r.is_pinned and r.handle != self.handles[index]]
        try:
            adapters.pin(self.handles[index])
        except ValidationError:
            assert len(others) + 1 >= adapters.max_resident or self.max_bytes < 6

    @precondition(lambda self: self.plans)
    @rule()
    def run(self) -> None:
        """The shard executes the oldest plan."""
        failing = dict.fromkeys(self.failing, "planted")
        plan = self.plans.popleft()
        unable = {}
        for handle in plan.activate:
            self.num_activations += 1
            if self.num_activations % self.activations_per_failure == 0:
                unable[handle] = "planted"
        self.num_passes += len(plan.row_ids) > 1
        fails = len(plan.row_ids) > 1 and self.num_passes % self.passes_per_failure == 0
        harmful = {*self.harmful, *(plan.row_ids if fails else ())}
        outcome = self.shard.execute(plan, self.prepared, failing, unable, harmful)
        self.outcomes.append(outcome)
        self.counts["failed passes"] = self.counts.get("failed passes", 0) + bool(outcome.failed)

    @precondition(lambda self: self.outcomes)
    @rule()
    def apply(self) -> None:
        """The oldest outcome is booked."""
        outcome = self.outcomes.popleft()
        self.touched.booked(outcome)
        accepted = self.scheduler.apply(outcome, self.now)
        self._take_orders()
        self._note_inactive(outcome)
        tokens = iter(outcome.tokens.ids)
        for request_id, num, finish, counts in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, accepted, strict=True
        ):
            new = [next(tokens) for _ in range(num)]
            assert counts == (request_id in self.specs)
            if counts:
                self.received[request_id] += new
                self._verify(request_id, FinishCode(finish))

    @precondition(lambda self: self.outcomes)
    @rule()
    def apply_behind(self) -> None:
        """The next step is planned and runs before the oldest outcome is booked, if that may be."""
        outcome = self.outcomes[0]
        ended, is_plain = ended_rows(outcome), tells_only_tokens(outcome)
        if is_plain and (plan := self.scheduler.plan_behind(outcome.seq, ended, self.now)):
            self.counts["plans behind"] = self.counts.get("plans behind", 0) + 1
            self._planned(plan)
            self._take_orders()
            self.scheduler.check()
        self.apply()

    @rule()
    def prepare(self) -> None:
        """Rows that go on have their places in the next step, if no other step is to be made before."""
        self.scheduler.prepare(self.now)

    def _note_inactive(self, outcome: StepOutcome) -> None:
        self.inactive |= outcome.inactive.keys()
        self.counts["inactive"] = self.counts.get("inactive", 0) + len(outcome.inactive)

    def _verify(self, request_id: RequestId, finish: FinishCode) -> None:
        received, wanted = self.received[request_id], MODEL.expected_tokens(self.specs[request_id])
        assert received == wanted[: len(received)]
        if finish is not FinishCode.RUNNING:
            assert finish is FinishCode.ERROR or received == wanted
            self.counts["prompts only"] = self.counts.get("prompts only", 0) + (not wanted)
            del self.specs[request_id]

    @rule(num=st.integers(1, 12))
    def turn(self, num: int) -> None:
        """The engine loop turns a few times without disturbance."""
        for _ in range(num):
            self._turn()

    def _turn(self) -> None:
        num_before = self.scheduler.num_in_flight
        self.plan()
        if self.turns_ahead:
            self.prepare()
        while self.plans:
            self.run()
        if self.scheduler.num_in_flight in (self.depth, num_before) and self.outcomes:
            (self.apply_behind if self.turns_ahead else self.apply)()
        self.scheduler.check()

    @rule(num_blocks=st.integers(2, 9), max_bytes=st.integers(1, 6))
    def lose_shards(self, num_blocks: int, max_bytes: int) -> None:
        """Another shard group, empty and of another size, takes the place of a dead one.

        Nothing in flight is answered; orders that were under way may still be, in vain.
        """
        # One that has ended may be to blame, too.
        in_flight = {
            row.request.request_id for step in self.scheduler._in_flight for row in step.rows
        }
        self.epoch += 1
        self.sizes, self.max_bytes = (num_blocks, self.sizes[1]), max_bytes
        ended = self.scheduler.shards_lost(
            self.now, epoch=self.epoch, num_blocks=num_blocks, adapter_bytes=max_bytes
        )
        preparing = {handle for handle, event, _ in self.orders if event is AdapterEvent.PREPARED}
        for request_id, text in ended.ended.items():
            spec = self.specs.pop(request_id)
            num_kv = len(spec.prompt_ids) + max(spec.stopping.max_new_tokens - 1, 0)
            if request_id in ended.impossible:
                assert num_kv > num_blocks * self.sizes[1] or not self._may_fit(spec.adapter)
            elif "prepared its adapter" in text:
                assert spec.adapter in preparing
            else:
                assert in_flight == {request_id} and not preparing
            name = "impossible" if request_id in ended.impossible else "blamed"
            self.counts[name] = self.counts.get(name, 0) + 1
        self.prepared.clear()
        self.plans.clear()
        self.outcomes.clear()
        self.touched.clear()
        self.inactive.clear()
        self.shard = make_shard(*self.sizes)
        assert self.scheduler.num_in_flight == 0

    @invariant()
    def is_sound(self) -> None:
        """Nothing is lost, shared or counted wrong."""
        if hasattr(self, "scheduler"):
            self.counts["steps"] = self.counts.get("steps", 0) + 1
            self.scheduler.check()
            verify_depths(self.scheduler.stats().queue_depths)

    def teardown(self) -> None:
        """Whatever the state, all requests come to their end and all blocks come back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            if self.scheduler.is_idle:
                break
            self._turn()
            while self.orders:
                self.settle(0)
        assert self.scheduler.is_idle, "the scheduler does not come to rest"
        self._end_adapters()
        assert not self.specs
        stats = self.scheduler.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert stats.host.num_held == 0
        self.counts["swaps"] = self.counts.get("swaps", 0) + stats.host.num_swaps

    def _end_adapters(self) -> None:
        """Whoever was called or pinned comes, and whoever was replaced is gone."""
        for _ in range(60):
            self._turn()
            while self.orders:
                self.settle(0)
        records = self.scheduler.adapters.snapshot()
        assert {record.handle for record in records} == set(self.handles[1:])
        for record in records:
            assert not record.is_called
            assert not record.is_pinned or record.state is AdapterState.RESIDENT


@pytest.mark.parametrize(
    ("policy", "depth", "num_host_blocks"),
    [
        ("fcfs", 1, 0),
        ("fcfs", 2, 0),
        ("fcfs", 3, 0),
        *((policy, 2, 0) for policy in POLICIES if policy != "fcfs"),
        ("fcfs", 1, 16),
        *((policy, 2, 16) for policy in ("fair", "priority")),
    ],
)
def test_any_order_of_events_gives_the_tokens_of_an_undisturbed_run(
    policy: str, depth: int, num_host_blocks: int
) -> None:
    """At least NUM_STEPS steps of the machine at each depth, with preemptions among them.

    With host memory some of those who give way are swapped out and some computed anew.
    """
    counts: dict[str, int] = {}
    values = {
        "depth": depth, "policy": policy, "num_host_blocks": num_host_blocks, "counts": counts,
    }  # fmt: skip
    machine = type("Machine", (SchedulerMachine,), values)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=NUM_STEPS // 20,
            stateful_step_count=STEPS_PER_EXAMPLE,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    facts = ", ".join(f"{num} {what}" for what, num in counts.items())
    print(f"FIGURE {policy} depth {depth} host blocks {num_host_blocks}: {facts}")
    assert counts["steps"] >= NUM_STEPS
    assert counts["plans"] >= NUM_STEPS // 16
    if not num_host_blocks:
        assert counts["swaps"] == counts["brought back"] == 0
    if NUM_STEPS >= MANY_STEPS:
        verify_rare_events(counts, policy, num_host_blocks)
