"""The engine loop: plan, run, apply, around one scheduler and one shard group.

The only owner of the scheduler. Plans are sent as soon as they can be made: where a step's outcome
does not change the next one, before it is applied. Its tokens are published to their streams after
the next step is on its way, so that clients never delay the shards.

When the shards are lost, scheduler and streams stay: what ran is computed again on the group
that comes next, and each stream goes on with its next token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from time import perf_counter
from typing import NamedTuple

from lorax_contract.errors import (
    DeadlineError,
    GenerationError,
    LoraxError,
    NoNumbersError,
    RowFailedError,
    ShardError,
    ShardUnavailableError,
    ShuttingDownError,
    UnhealthyError,
)
from lorax_contract.step import (
    BASE_ADAPTER,
    NO_NUMBERS_CODE,
    AdapterHandle,
    FinishCode,
    RequestId,
    RequestSpec,
    RowDetail,
    StepOutcome,
    StepPlan,
    TokenColumns,
)
from lorax_router.core.adapters.table import AdapterCapacity, AdapterRecord
from lorax_router.core.booking import ended_rows, tells_only_tokens
from lorax_router.core.groups import RequestGroup
from lorax_router.core.ports import SessionSource, ShardClient
from lorax_router.core.request import ANY_TERMS, RequestTerms
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.engine.losses import Losses
from lorax_router.service.engine.orders import AdapterOrders, OrderExecutor
from lorax_router.service.engine.port import (
    EngineStats,
    StepObserver,
    TokenChunk,
    TokenStream,
)
from lorax_router.service.engine.stream import EngineStream
from lorax_router.service.single_flight import SingleFlight

logger = logging.getLogger(__name__)

# How often turns of adapters are looked at while no step runs.
_IDLE_TICK_S = 0.5

# Turns of the event loop in which a step gets from its task into the socket: the task of the rank,
# where there are several, begins in the next one, that of its call in the one behind that.
_TURNS_TO_SEND = 3


class _Sent(NamedTuple):
    method: str
    sent_at: float
    answer: asyncio.Task[StepOutcome]


class EngineLoop:
    """Runs steps while there is work; implements EnginePort.

    Args:
        shards: the shard group; its step calls are answered in order of ``seq``.
        scheduler: owned by this loop from here on.
        sessions: of these shards, by which the loop goes on with the next group when one is lost;
            None: it ends then.
        adapters: prepares and releases adapters; needed if the scheduler knows any.
        observer: told about each step, for metrics.
        clock: monotonic seconds, for the policy.
        least_hang_s: seconds that a step lasts at least before it is taken for one that hangs.
    """

    def __init__(
        self,
        shards: ShardClient,
        scheduler: Scheduler,
        *,
        sessions: SessionSource | None = None,
        adapters: OrderExecutor | None = None,
        observer: StepObserver | None = None,
        clock: Callable[[], float] = perf_counter,
        least_hang_s: float = 30.0,
    ) -> None:
        self._shards = shards
        self._sessions = sessions
        self._scheduler = scheduler
        self._observer = observer
        self._clock = clock
        self._streams: dict[RequestId, EngineStream] = {}
        self._ids = itertools.count(1)
        self._sent: deque[_Sent] = deque()
        self._work = asyncio.Event()
        self._failure: LoraxError | None = None
        self._probes: SingleFlight[None] = SingleFlight()
        self._adapters = adapters
        self._orders: AdapterOrders | None = None
        if adapters is not None:
            self._orders = AdapterOrders(scheduler, adapters, clock, self._adapter_changed)
        self._losses = Losses(
            scheduler, sessions, self._orders, clock, least_hang_s,
            on_loss=self._work.set, observer=observer,
        )  # fmt: skip

    # --- requests ---------------------------------------------------------------

    def new_request_id(self) -> RequestId:
        """Return an id never used before in this process."""
        return RequestId(next(self._ids))

    def submit(self, spec: RequestSpec, terms: RequestTerms = ANY_TERMS) -> TokenStream:
        """Queue a request and return its stream; closing the stream cancels the request.

        Raises ValidationError when it can never fit, QueueFullError or BusyError when too much
        waits, DeadlineError when it would be too late, UnhealthyError or ShuttingDownError when
        the loop has ended.
        """
        if self._failure is not None:
            raise self._failure
        now = self._clock()
        self._losses.refuse_deadly(spec, now)
        self._scheduler.submit(spec, now, terms)
        stream = EngineStream(partial(self._cancel, spec.request_id), spec, now)
        self._streams[spec.request_id] = stream
        self._work.set()
        return stream

    def check_place(
        self, terms: RequestTerms, *, num_requests: int = 1, num_tokens: int = 0
    ) -> None:
        """Raise what requests would get from the queue that come together now."""
        self._scheduler.backlog.check(terms, num_requests, num_tokens, self._clock())

    def _cancel(self, request_id: RequestId) -> None:
        """End a request whose client is gone; its row leaves with the next step."""
        if self._streams.pop(request_id, None) is not None:
            self._scheduler.cancel(request_id)
            self._work.set()

    # --- adapters ---------------------------------------------------------------

    def add_adapter(
        self, handle: AdapterHandle, nbytes: int, content: str = "", rank: int = 0
    ) -> None:
        """Make an adapter known; ValidationError if it can never be resident.

        ``content`` is equal for adapters that compute the same; "": no other does.
        """
        self._scheduler.adapters.add(handle, nbytes, content=content, rank=rank)

    async def load_adapter(self, handle: AdapterHandle, *, pin: bool = False) -> None:
        """Have an adapter on the shards; returns when it is, raises why it is not."""
        if self._failure is not None:
            raise self._failure
        assert self._orders is not None
        if pin:
            self._scheduler.adapters.pin(handle)
        self._scheduler.adapters.check_possible(handle)
        arrival = self._orders.arrival(handle)
        self._scheduler.adapters.want(handle, self._clock())
        self._work.set()
        await asyncio.shield(arrival)

    def pin_adapter(self, handle: AdapterHandle) -> None:
        """Keep an adapter on the shards; ValidationError when others would have no room left."""
        self._scheduler.adapters.pin(handle)
        self._work.set()

    def unpin_adapter(self, handle: AdapterHandle) -> None:
        """Let an adapter be evicted again."""
        self._scheduler.adapters.unpin(handle)

    async def retire_adapter(self, handle: AdapterHandle) -> None:
        """Let an adapter go for good; returns when its last request is done and it is freed."""
        if self._failure is not None:
            raise self._failure
        assert self._orders is not None
        if handle not in self._scheduler.adapters:
            return
        self._scheduler.adapters.retire(handle)
        self._work.set()
        await asyncio.shield(self._orders.departure(handle))

    def is_adapter_resident(self, handle: AdapterHandle) -> bool:
        """Whether an adapter is on the shards, ready for requests."""
        return self._scheduler.adapters.is_resident(handle)

    def adapter_record(self, handle: AdapterHandle) -> AdapterRecord | None:
        """Return what the scheduler knows of an adapter; not to be changed."""
        return self._scheduler.adapters.find(handle)

    def adapters_in_play(self) -> list[AdapterRecord]:
        """Return the adapters that are on the shards, come, go or are waited for."""
        return self._scheduler.adapters.in_play()

    def adapter_capacity(self) -> AdapterCapacity:
        """Return how much room there is for adapters, and how much of it is taken."""
        return self._scheduler.adapters.capacity()

    def _adapter_changed(self, ended: list[RequestId], error: LoraxError | None) -> None:
        for request_id in ended:
            self._end_stream(request_id, error)
        self._work.set()

    # --- the loop ---------------------------------------------------------------

    async def run(self) -> None:
        """Run until cancelled, or until the shards fail for good: then every request fails in words."""
        try:
            while True:
                try:
                    if self._losses.known is not None:
                        raise self._losses.known
                    self._send_plans()
                    if self._sent:
                        await self._take_outcome()
                    else:
                        await self._rest()
                except ShardError as error:
                    await self._recover(error)
        except Exception as error:
            logger.error("the engine loop ends: %s", error)
            self._fail_all(UnhealthyError(f"the shards failed: {error}", public=""))
            raise
        finally:
            self._fail_all(ShuttingDownError())
            if self._orders is not None:
                self._orders.close(self._failure or ShuttingDownError())
            if self._sessions is not None:
                self._sessions.end(ShardUnavailableError("the engine loop has ended"))
            self._forget_sent()

    def _forget_sent(self) -> None:
        for sent in self._sent:
            # What became of steps behind the one that failed is no news for the log.
            sent.answer.add_done_callback(lambda each: each.cancelled() or each.exception())
            sent.answer.cancel()
        self._sent.clear()

    # --- lost shards ------------------------------------------------------------

    @property
    def has_shards(self) -> bool:
        """Whether there are shards, and not only others to come."""
        return self._losses.has_shards

    def expect_no_shards(self) -> None:
        """Wait for no others from now on: shards that are lost end what runs."""
        self._losses.expect_none()

    async def _recover(self, error: ShardError) -> None:
        """Go on with the group of shards that comes next; raises what says that none comes."""
        self._forget_sent()
        lost_at = perf_counter()
        try:
            lost = await self._losses.outlast(error, len(self._streams), self._end_late)
        except asyncio.CancelledError:
            self._fail_all(UnhealthyError(f"the shards failed: {error}", public=""))
            raise
        for waited in self._streams.values():
            waited.cost.outlived(lost_at, perf_counter())
        for request_id, text in lost.impossible.items():
            self._end_stream(request_id, GenerationError(text))
        for request_id, text in lost.blamed.items():
            if (stream := self._streams.get(request_id)) is not None:
                self._losses.remember_deadly(stream.spec, text, self._clock())
            self._end_stream(request_id, RowFailedError(text))
        for request_id, stream in list(self._streams.items()) if lost.blamed else ():
            # What is the same in all that matters would do the same.
            if (known := self._losses.deadly(stream.spec, self._clock())) is not None:
                self._scheduler.cancel(request_id)
                self._end_stream(request_id, RowFailedError(known))

    def _send_plans(self) -> None:
        while (plan := self._scheduler.plan(self._clock())) is not None:
            self._send(plan)
        self._end_late()
        if self._orders is not None:
            self._orders.carry_out()

    def _send(self, plan: StepPlan) -> None:
        now = perf_counter()
        answer = asyncio.ensure_future(self._shards.step(plan))
        method = "prefill" if plan.new_rows else "decode"
        self._sent.append(_Sent(method, now, answer))
        for row in plan.new_rows:
            if stream := self._streams.get(row.spec.request_id):
                stream.cost.enters(now, row.num_cached)
        # Behind the task that begins the call and that of the call: nobody waits for what is counted.
        call_soon = asyncio.get_running_loop().call_soon
        call_soon(call_soon, self._observe_sent, plan)

    def _end_late(self) -> None:
        """End the requests that are too late, and tell their clients why."""
        for request_id, text in self._scheduler.take_late(self._clock()).items():
            self._end_stream(request_id, DeadlineError(text))

    def _end_stream(self, request_id: RequestId, error: LoraxError | None) -> None:
        if (stream := self._streams.pop(request_id, None)) is not None:
            stream.put(TokenChunk(TokenColumns(), FinishCode.ERROR, error=error))

    async def _take_outcome(self) -> None:
        sent = self._sent[0]
        try:
            outcome = await self._losses.watched(sent.answer)
        except Exception:
            self._observe_done(sent, ok=False)
            raise
        received_at = perf_counter()
        self._sent.popleft()
        plan = None
        if tells_only_tokens(outcome):
            plan = self._scheduler.plan_behind(outcome.seq, ended_rows(outcome), self._clock())
        if plan is not None:
            self._send(plan)
            await _handed_over()
        for handle, text in outcome.inactive.items():
            logger.warning("adapter %d did not take effect: %s", handle, text)
        if outcome.failed:
            logger.warning(
                "step %d: a pass failed (%s); its %d rows are computed again, in halves",
                outcome.seq, outcome.failure, len(outcome.failed),
            )  # fmt: skip
        accepted = self._scheduler.apply(outcome, self._clock())
        self._send_plans()
        if plan is None:
            # The step above is on its way before clients get their tokens.
            await _handed_over()
        for row_id, num in outcome.drafted.items():
            if (stream := self._streams.get(row_id)) is not None:
                stream.cost.num_drafted += num
        self._publish(outcome, accepted, received_at)
        self._observe_done(sent, ok=True)
        self._scheduler.prepare(self._clock())

    async def _rest(self) -> None:
        """Nothing to do: audit, then sleep until a request or an adapter comes."""
        is_idle = self._scheduler.is_idle
        if is_idle:
            self._scheduler.check(is_idle=True)
        self._work.clear()
        if self._losses.known is not None:
            return
        # Requests that wait for an adapter: turns and deadlines come with time, too.
        left = max(0.0, self._scheduler.deadlines.next_look - self._clock())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if is_idle else min(left, _IDLE_TICK_S)):
                await self._work.wait()

    def _publish(self, outcome: StepOutcome, accepted: list[bool], received_at: float) -> None:
        start = 0
        tokens, details = outcome.tokens, outcome.details
        for row_id, num, finish, counts in zip(
            outcome.row_ids, outcome.num_tokens, outcome.finish, accepted, strict=True
        ):
            stop = start + num
            stream = self._streams.get(row_id) if counts else None
            if stream is not None:
                chunk = TokenChunk(
                    tokens.part(start, stop),
                    received_at=received_at,
                    scheduled_at=stream.cost.scheduled_at,
                    num_cached_tokens=stream.cost.num_cached,
                )
                if finish or not stream.first_sent or row_id in details:
                    self._finish_chunk(chunk, row_id, finish, details.get(row_id), stream)
                stream.put(chunk)
            start = stop

    def _finish_chunk(
        self, chunk: TokenChunk, row_id: RequestId, finish: int, detail: RowDetail | None,
        stream: EngineStream,
    ) -> None:  # fmt: skip
        """Add what only some chunks have, and let go of a stream that ended."""
        if not stream.first_sent and stream.handle != BASE_ADAPTER:
            chunk.adapter_phases = self._adapter_phases(stream)
        if detail is not None:
            chunk.alternatives = detail.alternatives
            chunk.generated_text = detail.generated_text
            chunk.vector = detail.vector
            # A row that was preempted before its first token reports its prompt again.
            if not stream.first_sent:
                chunk.prompt_tokens = detail.prompt_tokens
                chunk.prompt_alternatives = detail.prompt_alternatives
        stream.first_sent = True
        if finish == FinishCode.RUNNING:
            return
        chunk.finish = FinishCode(finish)
        del self._streams[row_id]
        if chunk.finish is FinishCode.ERROR:
            chunk.error = self._error_of(stream.handle, detail)
        elif self._adapters is not None and stream.handle != BASE_ADAPTER:
            self._adapters.numbers(stream.handle)

    def _error_of(self, handle: AdapterHandle, detail: RowDetail | None) -> RowFailedError:
        """Return why a row failed; if by its numbers, whoever knows the adapter hears of it."""
        reason = (detail.error_text if detail else None) or "the shard gave no reason"
        if detail is None or detail.error_code != NO_NUMBERS_CODE:
            return RowFailedError(reason)
        if self._adapters is not None and handle != BASE_ADAPTER:
            self._adapters.no_numbers(handle)
        return NoNumbersError(reason)

    def _adapter_phases(self, stream: EngineStream) -> dict[str, float] | None:
        """Return what an adapter's way to the shards cost this request; None: it was there."""
        load = self._orders.loads.get(stream.handle) if self._orders is not None else None
        if load is None or load.ready_at <= stream.submitted_at:
            return None
        return {
            "wait": max(0.0, load.ordered_at - stream.submitted_at),
            "parse": load.report.parse_s,
            "copy": load.report.copy_s,
        }

    def _fail_all(self, error: LoraxError) -> None:
        """End every stream with ``error`` and refuse new requests from now on."""
        self._failure = self._failure or error
        streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            self._scheduler.cancel(request_id)
            public = error
            if isinstance(error, UnhealthyError):
                # Addresses and reasons are for the log.
                public = GenerationError(str(error), public="the shards failed")
            stream.put(TokenChunk(TokenColumns(), FinishCode.ERROR, error=public))

    # --- facts ------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Return a snapshot."""
        return self._scheduler.stats()

    def service_here(self) -> Mapping[str, float]:
        """Return what each tenant got of this server so far, in tokens by its weight."""
        return self._scheduler.service_here()

    def served_elsewhere(self, amounts: Mapping[str, float]) -> None:
        """Charge tenants what other servers gave them since the last call."""
        self._scheduler.served_elsewhere(amounts)

    def queued_elsewhere(self, depths: Mapping[str, tuple[int, int]]) -> None:
        """Take what tenants have waiting at other servers, requests and tokens: their bounds hold over all."""
        self._scheduler.backlog.queued_elsewhere(depths)

    def groups(self) -> list[RequestGroup]:
        """Return who runs and who waits, by adapter and tenant."""
        return self._scheduler.groups()

    async def health(self) -> None:
        """Raise UnhealthyError when the shards do not answer or the loop has ended.

        All who ask meanwhile share one call of the shards, which a crowd would keep from their work.
        """
        if self._failure is not None:
            raise UnhealthyError(str(self._failure), public="")
        try:
            await self._probes.do("health", self._shards.health)
        except LoraxError as error:
            raise UnhealthyError(str(error), public="") from error

    def _observe_sent(self, plan: StepPlan) -> None:
        if self._observer is not None:
            self._observer.step_sent(
                num_rows=len(plan.row_ids),
                num_tokens=sum(plan.num_tokens),
                num_new_rows=len(plan.new_rows),
            )

    def _observe_done(self, sent: _Sent, *, ok: bool) -> None:
        if self._observer is not None:
            duration_s = perf_counter() - sent.sent_at
            self._observer.step_done(
                method=sent.method, duration_s=duration_s, ok=ok, stats=self.stats()
            )


async def _handed_over() -> None:
    """Return when steps that were just sent are with the transport."""
    for _ in range(_TURNS_TO_SEND):
        await asyncio.sleep(0)
