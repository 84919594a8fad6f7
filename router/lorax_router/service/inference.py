"""One request from admission to its last token, whichever front end brought it.

``generate`` waits for the whole answer, ``generate_stream`` hands out chunks as the
shards deliver them. Both hold permits while they last, and both end in exactly one
line in the log and one outcome in the metrics, also when the client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from time import perf_counter

from lorax_contract.activation import activation_start
from lorax_contract.errors import (
    GenerationError,
    ShuttingDownError,
    UnhealthyError,
    ValidationError,
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
from lorax_router.service.adapters.text import AdapterText
from lorax_router.service.adapters.tokens import TenantTokens
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.chat.outputs import OutputParsers, OutputsByTemplate
from lorax_router.service.constraints.readiness import Constraints
from lorax_router.service.engine.port import EnginePort, TokenStream
from lorax_router.service.generation import ignore_adapter
from lorax_router.service.generation_stream import (
    GenerationStream,
    adapter_content,
    reported_seed,
)
from lorax_router.service.keys.meters import Meters, TenantMeter
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.permits import Permit, Permits
from lorax_router.service.records import RequestRecord
from lorax_router.service.requests import (
    ChatPrompt,
    GenerateParameters,
    GenerateRequest,
    TextPrompt,
    ValidRequest,
)
from lorax_router.service.results import (
    AdapterUse,
    GenerateResult,
    Sequence,
    shown_numbers,
)
from lorax_router.service.sequences import SequenceChunks
from lorax_router.service.timeouts import deadline_of, within
from lorax_router.service.validation import CheckedRequest, Validator

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
        self._tokens = tokens or TenantTokens()
        self._adapters = adapters
        self._constraints = constraints
        self._outputs = outputs or OutputsByTemplate(OutputParsers())
        self._engine = engine
        self._validator = validator
        self._metrics = metrics
        self._permits = Permits(max_concurrent_requests)
        self._tenant_limits = tenant_limits
        self._health_timeout_s = health_timeout_s
        self._is_draining = False
        # Of requests that wait for their adapter: ends the wait.
        self._resolving: set[asyncio.Timeout] = set()

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
        for waiting in self._resolving:
            waiting.reschedule(asyncio.get_running_loop().time())

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
        async with aclosing(await self._submit(valid, None)) as chunks:
            async for _ in chunks:
                pass

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the whole answer; cancelling the call cancels the request."""
        record = self._new_record(request, is_stream=False)
        permit, lease = None, None
        try:
            checked = self._check(request, record, stream=False)
            permit = self._admit(checked)
            async with within(deadline_of(checked, record)):
                lease = await self._resolve(checked, record)
                valid = await self._complete(checked, lease, record)
            self._check_place(valid, record)
            result = await self._run(valid, lease, record)
        except BaseException as error:
            record.close(error)
            raise
        finally:
            if lease is not None:
                lease.release()
            if permit is not None:
                permit.give_back()
        record.close(None)
        return result

    async def generate_stream(
        self, request: GenerateRequest, on_adapter: Callable[[AdapterUse], None] = ignore_adapter
    ) -> GenerationStream:
        """Admit a request and return its chunks; the caller closes the stream.

        ``on_adapter`` hears of the adapter that it uses before it is waited for.
        """
        record = self._new_record(request, is_stream=True)
        permit, lease = None, None
        try:
            checked = self._check(request, record, stream=True)
            permit = self._admit(checked)
            if checked.selection is not None:
                on_adapter(_use(checked.selection))
            async with within(deadline_of(checked, record)):
                lease = await self._resolve(checked, record)
                valid = await self._complete(checked, lease, record)
            self._check_place(valid, record)
            chunks = await self._submit(valid, lease, record.trace)
            record.follow(chunks.costs)
        except BaseException as error:
            if lease is not None:
                lease.release()
            if permit is not None:
                permit.give_back()
            record.close(error)
            raise
        return GenerationStream(valid, chunks, record, permit, lease)

    async def count_tokens(self, request: GenerateRequest) -> int:
        """Return how many tokens a prompt has for its model; nothing is generated."""
        meter = self.meters.of(request.caller)
        self.check_open()
        meter.start_request()
        checked = self._validator.check(request, stream=False)
        self._check_sees(checked)
        permit, lease = self._admit(checked), None
        try:
            if checked.selection is not None:
                lease = await self._acquire(checked, meter)
            return await self._validator.num_prompt_tokens(checked, _text(lease))
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
        permit = self._admit(checked)
        try:
            lease = await self._acquire(checked, self.meters.of(request.caller))
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

    def _check(
        self, request: GenerateRequest, record: RequestRecord, *, stream: bool
    ) -> CheckedRequest:
        """Check what needs no tokens, and count the request."""
        self.check_open()
        record.meter.start_request()
        checked = self._validator.check(request, stream=stream)
        self._check_sees(checked)
        return checked

    @staticmethod
    def _check_sees(checked: CheckedRequest) -> None:
        """Raise what a caller gets who may not know of the adapter."""
        # The server's own adapter is everybody's who names none.
        if checked.selection is not None and not checked.selection.is_default:
            checked.request.caller.check_sees(checked.selection.refs)

    def _admit(self, checked: CheckedRequest) -> Permit:
        """Let a request in, one that will wait for its adapter beside all others."""
        selection = checked.selection
        waits = selection is not None and not self._is_resident(selection)
        return self._permits.take(checked.num_sequences, selection if waits else None)

    def _is_resident(self, selection: AdapterSelection) -> bool:
        return self._adapters is not None and self._adapters.is_resident(selection)

    async def _resolve(self, checked: CheckedRequest, record: RequestRecord) -> AdapterLease | None:
        """Find the request's adapter; until then it waits as ``resolving``, and only it."""
        if checked.selection is None:
            return None
        record.selections(_use(checked.selection))
        started = perf_counter()
        lease = await self._acquire(checked, record.meter)
        record.resolved(lease, started)
        return lease

    async def _acquire(self, checked: CheckedRequest, meter: TenantMeter) -> AdapterLease:
        assert self._adapters is not None
        assert checked.selection is not None
        lease = self._adapters.acquire_known(checked.selection)
        if lease is None:
            lease = await self._waited(self._adapters.acquire(checked.selection, meter=meter))
        if lease.is_private:
            self._tokens.opened(checked.request.caller, checked.selection.token)
        return lease

    async def _waited(self, acquiring: Awaitable[AdapterLease]) -> AdapterLease:
        """Wait for an adapter until the server shuts down: ShuttingDownError then."""
        try:
            with self._metrics.resolving():
                async with asyncio.timeout(None) as waiting:
                    self._resolving.add(waiting)
                    return await acquiring
        except TimeoutError:
            if not waiting.expired():
                raise
            raise ShuttingDownError from None
        finally:
            self._resolving.discard(waiting)

    async def _complete(
        self, checked: CheckedRequest, lease: AdapterLease | None, record: RequestRecord
    ) -> ValidRequest:
        text, request = _text(lease), checked.request
        started = perf_counter()
        _check_resumed(request, lease)
        valid = await self._validator.complete(
            checked,
            text,
            lease.head if lease else None,
            deadline=deadline_of(checked, record),
            limits=request.caller.quotas.limits(self._tenant_limits),
        )
        record.tokenized(started)
        if lease is not None and lease.invocation_ids:
            start = activation_start(valid.prompt_ids, lease.invocation_ids)
            valid = replace(valid, adapter_start=start)
        constraint = request.parameters.constraint
        if isinstance(prompt := request.prompt, ChatPrompt):
            parsers = self._outputs.of(text.chat_template)
            valid = replace(valid, new_parser=parsers.reading(prompt, valid.prompt_text))
            constraint = parsers.constraint(prompt, valid.prompt_text, constraint)
        if constraint is None:
            return valid
        if self._constraints is None:
            raise ValidationError(
                f"`{constraint.field_name}` is not offered by this server; leave it out"
            )
        has_own_tokens = lease is not None and lease.text.tokenizer is not None
        content = lease.content if lease is not None and has_own_tokens else None
        return replace(valid, constraint=await self._constraints.ready(constraint, content))

    def _check_place(self, valid: ValidRequest, record: RequestRecord) -> None:
        """Raise what the queue refuses a request's sequences for; else count it.

        What it refuses costs no tokens: it is asked before they are counted.
        """
        num = len(valid.samplings)
        num_tokens = num * (valid.num_prompt_tokens + valid.stopping.max_new_tokens)
        self._engine.check_place(valid.terms, num_requests=num, num_tokens=num_tokens)
        record.validated(valid)

    async def _submit(
        self, valid: ValidRequest, lease: AdapterLease | None, trace: TraceContext | None = None
    ) -> SequenceChunks:
        """Submit all sequences, or none."""
        streams: list[TokenStream] = []
        try:
            for sampling in valid.samplings:
                stream = self._submit_one(valid, sampling, _handle(lease), trace)
                streams.append(stream)
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        return SequenceChunks(streams, valid.output, adapter=lease.label if lease else "")

    def _submit_one(
        self,
        valid: ValidRequest,
        sampling: SamplingParams,
        adapter: AdapterHandle,
        trace: TraceContext | None,
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

    async def _run(
        self, valid: ValidRequest, lease: AdapterLease | None, record: RequestRecord
    ) -> GenerateResult:
        """Generate all sequences at once; the first that fails ends the others."""
        sequences = [Sequence(reported_seed(sampling)) for sampling in valid.samplings]
        async with aclosing(await self._submit(valid, lease, record.trace)) as chunks:
            record.follow(chunks.costs)
            async for number, chunk in chunks:
                record.sequences[number].take(chunk)
                sequences[number].take(chunk)
        _finish(valid, sequences)
        shown = shown_numbers(sequences, valid.num_returned)
        record.show(shown)
        return GenerateResult(
            sequences=tuple(sequences[number] for number in shown),
            texts=tuple(valid.full_text(sequences[number].generated_text) for number in shown),
            details=valid.details,
            num_prompt_chars=len(valid.sent_text),
            new_parser=valid.new_parser,
            num_prompt_tokens=valid.num_prompt_tokens,
            num_cached_tokens=record.num_cached,
            num_skipped_tokens=record.num_skipped,
            timings=record.timings,
            adapter=record.adapter,
            head=valid.head,
            spans=None if valid.spans is None else [*valid.spans],
        )


def _finish(valid: ValidRequest, sequences: list[Sequence]) -> None:
    """Let vectors be as they were asked for; raises ValidationError."""
    if valid.output is not OutputKind.VECTOR:
        return
    for sequence in sequences:
        assert sequence.vector is not None
        sequence.vector = valid.shape.finished(sequence.vector)


def _use(selection: AdapterSelection) -> AdapterUse:
    return AdapterUse(selection.ids, selection.refs[0].source, selection.label)


def _text(lease: AdapterLease | None) -> AdapterText:
    """Return what a request's adapter brings for texts."""
    return AdapterText() if lease is None else lease.text


def _check_resumed(request: GenerateRequest, lease: AdapterLease | None) -> None:
    """Raise GenerationError if another adapter would go on with an output than began it."""
    resumed = request.resumption
    if resumed is not None and resumed.adapter_content != adapter_content(lease):
        text = "the adapter was replaced while its answer was written; ask again"
        raise GenerationError(text, public=text)


def _handle(lease: AdapterLease | None) -> AdapterHandle:
    return BASE_ADAPTER if lease is None else lease.handle
