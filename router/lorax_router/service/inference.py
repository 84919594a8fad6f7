"""One request from admission to its last token, whichever front end brought it.

``generate`` waits for the whole answer, ``generate_stream`` hands out chunks as the
shards deliver them. Both hold permits while they last, and both end in exactly one
line in the log and one outcome in the metrics, also when the client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Many
from contextlib import aclosing
from dataclasses import replace
from time import perf_counter

from lorax_contract.errors import (
    LoraxError,
    ShuttingDownError,
    UnhealthyError,
)
from lorax_contract.pooling import HeadFacts
from lorax_contract.step import (
    BASE_ADAPTER,
    AdapterHandle,
    OutputKind,
    RequestSpec,
    SamplingParams,
)
from lorax_contract.tracing import TraceContext
from lorax_router.core.request import RequestTerms
from lorax_router.core.tenant_limits import NO_LIMITS, TenantLimits
from lorax_router.service.accounts.ledger import RequestLedger
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.directory import AdapterDirectory, AdapterLease
from lorax_router.service.adapters.seeking import AdapterSeeker, Known
from lorax_router.service.adapters.text import AdapterText
from lorax_router.service.adapters.tokens import TenantTokens
from lorax_router.service.beside import all_of
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.chat.outputs import OutputParsers, OutputsByTemplate
from lorax_router.service.completing import RequestCompleter
from lorax_router.service.constraints.readiness import Constraints
from lorax_router.service.engine.port import EnginePort, TokenStream
from lorax_router.service.generation import ignore_adapter
from lorax_router.service.generation_stream import GenerationStream, reported_seed
from lorax_router.service.keys.meters import Meters, TenantMeter
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.open_request import OpenRequest
from lorax_router.service.permits import Permit, Permits
from lorax_router.service.records import RequestRecord
from lorax_router.service.requests import (
    GenerateParameters,
    GenerateRequest,
    TextPrompt,
    ValidRequest,
)
from lorax_router.service.results import (
    AdapterUse,
    GenerateResult,
    Sequence,
)
from lorax_router.service.sequences import SequenceChunks
from lorax_router.service.timeouts import deadline_of, within
from lorax_router.service.validation import CheckedRequest, Made, Validator

# A probe shares with nobody, goes first, and is let in whatever waits.
_PROBE = RequestTerms(tenant="(probe)", priority=-(2**31), limits=TenantLimits(is_exempt=True))


class InferenceService:
    """The one door to the engine for all front ends.

    Args:
        engine: runs requests.
        validator: makes requests valid.
        metrics: counts them.
        adapters: finds the adapters that requests name; None: only the base model is served.
        constraints: makes ready what outputs are bound to; None: none is.
        outputs: what reads the answers in chats.
        meters: what tenants have taken of their quotas.
        tokens: which of them opened private adapters.
        max_concurrent_requests: sequences that may be in the house at once; see Permits.
        tenant_limits: what a tenant may have waiting and may hold of whom the keys say nothing else.
        health_timeout_s: seconds after which a silent engine counts as unhealthy.
        ledger: keeps the accounts of requests; None: one of its own, without spans.
    """

    def __init__(
        self,
        engine: EnginePort,
        validator: Validator,
        metrics: Metrics,
        *,
        max_concurrent_requests: int,
        adapters: AdapterDirectory | None = None,
        constraints: Constraints | None = None,
        outputs: OutputsByTemplate | None = None,
        meters: Meters | None = None,
        tokens: TenantTokens | None = None,
        tenant_limits: TenantLimits = NO_LIMITS,
        health_timeout_s: float = 10.0,
        ledger: RequestLedger | None = None,
    ) -> None:
        self.ledger = ledger or RequestLedger(metrics)
        self.meters = meters or Meters()
        self._adapters = None
        if adapters is not None:
            self._adapters = AdapterSeeker(adapters, tokens or TenantTokens(), metrics)
        self._completer = RequestCompleter(
            validator, outputs or OutputsByTemplate(OutputParsers()), constraints, tenant_limits
        )
        self._engine = engine
        self._validator = validator
        self._permits = Permits(max_concurrent_requests)
        self._tenant_limits = tenant_limits
        self._health_timeout_s = health_timeout_s
        self._is_draining = False

    def stop_admitting(self) -> None:
        """Refuse new requests from now on; those inside go on."""
        self._is_draining = True

    @property
    def is_open(self) -> bool:
        """Whether new requests are let in."""
        return not self._is_draining

    def check_open(self) -> None:
        """Raise ShuttingDownError once the server drains."""
        if self._is_draining:
            raise ShuttingDownError

    def check_room(self, caller: Caller = ANYBODY) -> None:
        """Raise what a request of one sequence would get at once, whatever is in it."""
        self.check_open()
        self.meters.of(caller).check()
        self._permits.check()
        terms = RequestTerms(caller.tenant, limits=caller.quotas.limits(self._tenant_limits))
        self._engine.check_place(terms)

    async def ask_room(self, caller: Caller) -> None:
        """The same for those who may have to ask another process."""
        self.check_room(caller)

    def start_request(self, caller: Caller) -> None:
        """Count a request that does not generate; raises QuotaError."""
        self.meters.of(caller).start_request()

    async def wait_idle(self) -> None:
        """Return once no request is inside."""
        await self._permits.idle.wait()

    def end_resolving(self) -> None:
        """Tell requests that still wait for their adapter that the server shuts down."""
        if self._adapters is not None:
            self._adapters.end_waits()

    async def health(self) -> None:
        """Raise UnhealthyError or ShuttingDownError unless requests can be served."""
        self.check_open()
        await self._in_time(self._engine.health(), "the shards do not answer")
        await self._in_time(self._validator.progress(), "no text can be tokenized")

    async def _in_time(self, probe: Awaitable[None], failure: str) -> None:
        try:
            async with asyncio.timeout(self._health_timeout_s):
                await probe
        except TimeoutError as error:
            raise UnhealthyError(failure, public="") from error

    async def probe(self) -> None:
        """Have one token, or a vector, made beside all permits and metrics; raises what goes wrong."""
        self.check_open()
        parameters = GenerateParameters(max_new_tokens=1, truncate=1)
        if not self._validator.abilities.generates:
            parameters = GenerateParameters(output=OutputKind.VECTOR)
        request = GenerateRequest(prompt=TextPrompt("Who?"), parameters=parameters)
        valid = await self._validator.complete(self._validator.check(request, stream=False))
        valid = replace(valid, terms=_PROBE)
        stream = self._submit_one(valid, valid.samplings[0], BASE_ADAPTER)
        async with aclosing(SequenceChunks([stream], valid.output)) as chunks:
            async for _ in chunks:
                pass

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the whole answer; cancelling the call cancels the request."""
        (found,) = await self._answers(request, (None,))
        if isinstance(found, LoraxError):
            raise found
        return found

    async def generate_through(
        self, request: GenerateRequest, adapters: Many[str]
    ) -> list[GenerateResult | LoraxError]:
        """Return the whole answer through each adapter, or what is wrong with it, in their order.

        What is wrong with one ends no other. Each is a request of its own to quotas, accounts and
        metrics; those whose adapters are known take their way together. Cancelling the call
        cancels them all.
        """
        return await self._answers(request, adapters)

    async def _answers(
        self, request: GenerateRequest, adapters: Many[str | None]
    ) -> list[GenerateResult | LoraxError]:
        """Answer a request through each adapter; None: the one that it names itself."""
        opened = [OpenRequest(self._new_record(request, is_stream=False)) for _ in adapters]
        try:
            self._enter_all(opened, request, adapters)
            admitted = [each for each in opened if each.is_open]
            known = [each for each in admitted if not each.waits]
            groups = [known] if known else []
            groups += [[each] for each in admitted if each.waits]
            await all_of([self._answer(each) for each in groups])
        except BaseException as error:
            for each in opened:
                await each.close(error)
            raise
        return [each.outcome for each in opened]

    def _enter_all(
        self, opened: list[OpenRequest], request: GenerateRequest, adapters: Many[str | None]
    ) -> None:
        is_checked = False
        for each, adapter_id in zip(opened, adapters, strict=True):
            try:
                self._enter(each, request, adapter_id, is_checked=is_checked)
                is_checked = True
            except LoraxError as error:
                each.fail(error)

    async def _answer(self, group: list[OpenRequest]) -> None:
        """Answer requests that were let in: one, or several whose adapters are known."""
        try:
            async with within(deadline_of(group[0].checked, group[0].record)):
                await self._resolve(group[0])
                await self._complete_all(group)
        except LoraxError as error:
            for each in group:
                each.fail(error)
        # Nothing waits between them: they are in one step, if that has room.
        for each in group:
            await self._begin(each)
        running = [each for each in group if each.is_open]
        if running and running[0].valid.output.pools:
            # They end together: nobody's end waits for another's.
            for each in running:
                await self._read(each)
        else:
            await all_of([self._read(each) for each in running])

    async def _complete_all(self, group: list[OpenRequest]) -> None:
        made: Made = {}
        for each in group:
            try:
                each.valid = await self._completer.complete(each, made)
            except LoraxError as error:
                each.fail(error)

    async def _begin(self, opened: OpenRequest) -> None:
        """Have the rows of a valid request wait for their turn."""
        if not opened.is_open:
            return
        try:
            self._check_place(opened)
            opened.chunks = await self._submit(opened)
        except LoraxError as error:
            opened.fail(error)

    async def generate_stream(
        self, request: GenerateRequest, on_adapter: Callable[[AdapterUse], None] = ignore_adapter
    ) -> GenerationStream:
        """Admit a request and return its chunks; the caller closes the stream.

        ``on_adapter`` hears of the adapter that it uses before it is waited for.
        """
        opened = OpenRequest(self._new_record(request, is_stream=True))
        try:
            self._enter(opened, request)
            if (selection := opened.checked.selection) is not None:
                on_adapter(_use(selection))
            async with within(deadline_of(opened.checked, opened.record)):
                await self._resolve(opened)
                opened.valid = await self._completer.complete(opened)
            self._check_place(opened)
            opened.chunks = await self._submit(opened)
        except BaseException as error:
            opened.end(error)
            raise
        return GenerationStream(opened)

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens a prompt has for its model; nothing is generated."""
        meter = self.meters.of(request.caller)
        self.check_open()
        meter.start_request()
        checked = self._validator.check(request, stream=False)
        self._check_sees(checked)
        (permit, known), lease = self._admit(checked), None
        try:
            if checked.selection is not None:
                lease = self._take(checked, known) or await self._find(checked, meter)
            text = AdapterText() if lease is None else lease.text
            return await self._validator.num_prompt_tokens(checked, text)
        finally:
            if lease is not None:
                lease.release()
            permit.give_back()

    async def head_of(self, request: GenerateRequest) -> HeadFacts | None:
        """Return the head that would classify a request's text; None: there is none."""
        self.check_open()
        checked = self._validator.check(request, stream=False)
        self._check_sees(checked)
        base = self._validator.abilities.head
        if checked.selection is None:
            return base
        permit, known = self._admit(checked)
        try:
            meter = self.meters.of(request.caller)
            lease = self._take(checked, known) or await self._find(checked, meter)
            lease.release()
        finally:
            permit.give_back()
        return lease.head or base

    def _new_record(self, request: GenerateRequest, *, is_stream: bool) -> RequestRecord:
        caller = request.caller
        return RequestRecord(
            self.ledger,
            is_stream=is_stream,
            caller=caller,
            meter=self.meters.of(caller),
            origin=request.origin,
        )

    def _enter(
        self,
        opened: OpenRequest,
        request: GenerateRequest,
        adapter_id: str | None = None,
        *,
        is_checked: bool = False,
    ) -> None:
        """Check what needs no tokens, count the request and let it in.

        It has its adapter behind that, unless it ``waits``. The last two are the validator's.
        """
        record = opened.record
        self.check_open()
        record.meter.start_request()
        checked = opened.checked = self._validator.check(
            request, stream=record.is_stream, adapter_id=adapter_id, is_checked=is_checked
        )
        self._check_sees(checked)
        opened.permit, known = self._admit(checked)
        if (selection := checked.selection) is None:
            return
        record.selections(_use(selection))
        started = perf_counter()
        if (lease := self._take(checked, known)) is not None:
            opened.lease = lease
            record.resolved(lease, started)

    @staticmethod
    def _check_sees(checked: CheckedRequest) -> None:
        """Raise what a caller gets who may not know of the adapter."""
        # The server's own adapter is everybody's who names none.
        if checked.selection is not None and not checked.selection.is_default:
            checked.request.caller.check_sees(checked.selection.refs)

    def _admit(self, checked: CheckedRequest) -> tuple[Permit, Known]:
        """Let a request in, one that will wait for its adapter beside all others.

        With it comes what is known of its adapter.
        """
        selection = checked.selection
        if selection is None or self._adapters is None:
            return self._permits.take(checked.num_sequences), None
        known = self._adapters.known(selection)
        is_resident = self._adapters.is_resident(selection, known)
        return self._permits.take(checked.num_sequences, None if is_resident else selection), known

    def _take(self, checked: CheckedRequest, known: Known) -> AdapterLease | None:
        """Return a hold on a request's adapter if it is known."""
        assert self._adapters is not None
        assert checked.selection is not None
        return self._adapters.take(checked.request.caller, checked.selection, known)

    async def _find(self, checked: CheckedRequest, meter: TenantMeter) -> AdapterLease:
        """Return a hold on a request's adapter, which is waited for."""
        assert self._adapters is not None
        assert checked.selection is not None
        return await self._adapters.find(checked.request.caller, checked.selection, meter)

    async def _resolve(self, opened: OpenRequest) -> None:
        """Find the adapter that a request waits for; until then it waits as ``resolving``."""
        if opened.waits:
            started = perf_counter()
            opened.lease = await self._find(opened.checked, opened.record.meter)
            opened.record.resolved(opened.lease, started)

    def _check_place(self, opened: OpenRequest) -> None:
        """Raise what the queue refuses a request's sequences for; else count it.

        What it refuses costs no tokens: it is asked before they are counted.
        """
        valid = opened.valid
        num = len(valid.samplings)
        num_tokens = num * (valid.num_prompt_tokens + valid.stopping.max_new_tokens)
        self._engine.check_place(valid.terms, num_requests=num, num_tokens=num_tokens)
        opened.record.validated(valid)

    async def _submit(self, opened: OpenRequest) -> SequenceChunks:
        """Submit all sequences, or none."""
        valid, lease = opened.valid, opened.lease
        streams: list[TokenStream] = []
        try:
            streams += (
                self._submit_one(valid, sampling, opened.handle, opened.record.trace)
                for sampling in valid.samplings
            )
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        chunks = SequenceChunks(streams, valid.output, adapter=lease.label if lease else "")
        opened.record.follow(chunks.costs)
        return chunks

    def _submit_one(
        self,
        valid: ValidRequest,
        sampling: SamplingParams,
        adapter: AdapterHandle,
        trace: TraceContext | None = None,
    ) -> TokenStream:
        return self._engine.submit(
            RequestSpec(
                request_id=self._engine.new_request_id(),
                prompt_ids=valid.prompt_ids,
                sampling=sampling,
                stopping=valid.stopping,
                adapter=adapter,
                adapter_start=valid.adapter_start,
                output=valid.output,
                second_start=valid.second_start,
                pooling=valid.shape.pooling,
                constraint=valid.constraint,
                trace=trace,
                resumed_ids=valid.resumed_ids,
            ),
            valid.terms,
        )

    async def _read(self, opened: OpenRequest) -> None:
        """Have all sequences of a request generated; the first that fails ends the others."""
        valid, record, chunks = opened.valid, opened.record, opened.chunks
        assert chunks is not None
        sequences = [Sequence(reported_seed(sampling)) for sampling in valid.samplings]
        try:
            async with aclosing(chunks):
                async for number, chunk in chunks:
                    record.sequences[number].take(chunk)
                    sequences[number].take(chunk)
            opened.answer(sequences)
        except LoraxError as error:
            opened.fail(error)


def _use(selection: AdapterSelection) -> AdapterUse:
    return AdapterUse(selection.ids, selection.refs[0].source, selection.label)
