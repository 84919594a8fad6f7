"""One request from admission to its last token, whichever front end brought it.

``generate`` waits for the whole answer, ``generate_stream`` hands out chunks as the
shards deliver them. Both hold permits while they last, and both end in exactly one
line in the log and one outcome in the metrics, also when the client leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from time import perf_counter
from types import TracebackType
from typing import Self

from lorax_contract.errors import (
    GenerationError,
    IncompleteGenerationError,
    LoraxError,
    ShardError,
    ShuttingDownError,
    UnhealthyError,
)
from lorax_contract.step import (
    BASE_ADAPTER,
    AdapterHandle,
    FinishCode,
    RequestSpec,
    SamplingParams,
)
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.directory import AdapterDirectory, AdapterLease
from lorax_router.service.engine.port import EnginePort, TokenChunk, TokenStream
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.permits import Permit, Permits
from lorax_router.service.records import RequestRecord, SequenceProgress
from lorax_router.service.requests import GenerateParameters, GenerateRequest, ValidRequest
from lorax_router.service.results import AdapterUse, GenerateResult, Sequence, Timings
from lorax_router.service.validation import CheckedRequest, Validator


class GenerationStream:
    """The chunks of one streamed request; its last chunk's ``finish`` is not RUNNING.

    Errors of the request are raised from ``__anext__``. The reader closes the stream
    (``async with`` does); closing it early cancels the request.
    """

    def __init__(
        self,
        request: ValidRequest,
        chunks: TokenStream,
        record: RequestRecord,
        permit: Permit,
        lease: AdapterLease | None,
    ) -> None:
        self.request = request
        # The seed to report: none was used when tokens are not drawn.
        self.seed = reported_seed(request.samplings[0])
        self._chunks = chunks
        self._record = record
        self._permit = permit
        self._lease = lease
        self._is_open = True

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return self._record.progress.num_generated

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenChunk:
        if not self._is_open:
            raise StopAsyncIteration
        try:
            chunk = await anext(self._chunks)
            self._record.progress.take(chunk)
            if chunk.finish is not FinishCode.RUNNING:
                check_last(chunk)
                self._end(None)
        except StopAsyncIteration:
            self._end(error := IncompleteGenerationError())
            raise error from None
        except LoraxError as error:
            self._end(error)
            raise
        return chunk

    async def aclose(self) -> None:
        """Cancel the request if it still runs."""
        if self._is_open:
            self._end(asyncio.CancelledError())
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _end(self, error: BaseException | None) -> None:
        self._is_open = False
        if self._lease is not None:
            self._lease.release()
        self._permit.give_back()
        self._record.close(error)


def _ignore(use: AdapterUse) -> None:
    """Hear of an adapter and do nothing."""


class InferenceService:
    """The one door to the engine for all front ends.

    Args:
        engine: runs requests.
        validator: makes requests valid.
        metrics: counts them.
        adapters: finds the adapters that requests name; None: only the base model is served.
        max_concurrent_requests: sequences that may be in the house at once; see Permits.
        health_timeout_s: seconds after which a silent engine counts as unhealthy.
    """

    def __init__(
        self,
        engine: EnginePort,
        validator: Validator,
        metrics: Metrics,
        *,
        max_concurrent_requests: int,
        adapters: AdapterDirectory | None = None,
        health_timeout_s: float = 10.0,
    ) -> None:
        self._adapters = adapters
        self._engine = engine
        self._validator = validator
        self._metrics = metrics
        self._permits = Permits(max_concurrent_requests)
        self._health_timeout_s = health_timeout_s
        self._is_draining = False
        # Of requests that wait for their adapter: ends the wait.
        self._resolving: set[asyncio.Timeout] = set()

    def stop_admitting(self) -> None:
        """Refuse new requests from now on; those inside go on."""
        self._is_draining = True

    def check_open(self) -> None:
        """Raise ShuttingDownError once the server drains."""
        if self._is_draining:
            raise ShuttingDownError

    def check_room(self) -> None:
        """Raise what a request of one sequence would get at once, whatever is in it."""
        self.check_open()
        self._permits.check()

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
        """Generate one token beside all permits and metrics; raises what goes wrong."""
        self.check_open()
        parameters = GenerateParameters(max_new_tokens=1, truncate=1)
        request = GenerateRequest(inputs="Who?", parameters=parameters)
        valid = await self._validator.complete(self._validator.check(request, stream=False))
        progress = SequenceProgress(Timings(perf_counter()), None)
        await self._collect(valid, valid.samplings[0], BASE_ADAPTER, progress)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Return the whole answer; cancelling the call cancels the request."""
        record = RequestRecord(self._metrics, is_stream=False)
        permit, lease = None, None
        try:
            checked = self._check(request, stream=False)
            permit = self._admit(checked)
            lease = await self._resolve(checked, record)
            valid = await self._complete(checked, lease)
            record.validated(valid)
            result = await self._run(valid, _handle(lease), record)
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
        self, request: GenerateRequest, on_adapter: Callable[[AdapterUse], None] = _ignore
    ) -> GenerationStream:
        """Admit a request and return its chunks; the caller closes the stream.

        ``on_adapter`` hears of the adapter that it uses before it is waited for.
        """
        record = RequestRecord(self._metrics, is_stream=True)
        permit, lease = None, None
        try:
            checked = self._check(request, stream=True)
            permit = self._admit(checked)
            if checked.selection is not None:
                on_adapter(_use(checked.selection))
            lease = await self._resolve(checked, record)
            valid = await self._complete(checked, lease)
            record.validated(valid)
            chunks = self._submit(valid, valid.samplings[0], _handle(lease))
        except BaseException as error:
            if lease is not None:
                lease.release()
            if permit is not None:
                permit.give_back()
            record.close(error)
            raise
        return GenerationStream(valid, chunks, record, permit, lease)

    def _check(self, request: GenerateRequest, *, stream: bool) -> CheckedRequest:
        """Check what needs no tokens."""
        self.check_open()
        return self._validator.check(request, stream=stream)

    def _admit(self, checked: CheckedRequest) -> Permit:
        """Let a request in, one that will wait for its adapter beside all others."""
        selection = checked.selection
        waits = selection is not None and not self._is_resident(selection)
        return self._permits.take(checked.best_of, selection if waits else None)

    def _is_resident(self, selection: AdapterSelection) -> bool:
        return self._adapters is not None and self._adapters.is_resident(selection)

    async def _resolve(self, checked: CheckedRequest, record: RequestRecord) -> AdapterLease | None:
        """Find the request's adapter; until then it waits as ``resolving``, and only it."""
        if checked.selection is None:
            return None
        assert self._adapters is not None
        record.selections(_use(checked.selection))
        started = perf_counter()
        try:
            with self._metrics.resolving():
                async with asyncio.timeout(None) as waiting:
                    self._resolving.add(waiting)
                    lease = await self._adapters.acquire(checked.selection)
        except TimeoutError:
            if not waiting.expired():
                raise
            raise ShuttingDownError from None
        finally:
            self._resolving.discard(waiting)
        record.resolved(lease, perf_counter() - started)
        return lease

    async def _complete(self, checked: CheckedRequest, lease: AdapterLease | None) -> ValidRequest:
        if lease is None:
            return await self._validator.complete(checked)
        return await self._validator.complete(checked, lease.text)

    def _submit(
        self, valid: ValidRequest, sampling: SamplingParams, adapter: AdapterHandle
    ) -> TokenStream:
        return self._engine.submit(
            RequestSpec(
                request_id=self._engine.new_request_id(),
                prompt_ids=valid.prompt_ids,
                sampling=sampling,
                stopping=valid.stopping,
                adapter=adapter,
            )
        )

    async def _run(
        self, valid: ValidRequest, adapter: AdapterHandle, record: RequestRecord
    ) -> GenerateResult:
        """Generate all sequences at once and put the likeliest first."""
        if len(valid.samplings) == 1:
            progress = record.progress
            sequence = await self._collect(valid, valid.samplings[0], adapter, progress)
            done = [(sequence, progress)]
        else:
            done = await self._run_each(valid, adapter, record)
        done.sort(key=lambda pair: pair[0].logprob, reverse=True)
        record.progress = done[0][1]
        sequences = tuple(sequence for sequence, _ in done)
        return GenerateResult(
            sequences=sequences,
            texts=tuple(valid.full_text(each.generated_text) for each in sequences),
            details=valid.details,
            num_prompt_chars=len(valid.inputs),
            num_prompt_tokens=valid.num_prompt_tokens,
            timings=record.progress.timings,
            adapter=record.adapter,
        )

    async def _run_each(
        self, valid: ValidRequest, adapter: AdapterHandle, record: RequestRecord
    ) -> list[tuple[Sequence, SequenceProgress]]:
        """Generate all sequences side by side; the first that fails ends the others."""
        progresses = [record.new_progress() for _ in valid.samplings]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._collect(valid, sampling, adapter, progress))
                    for sampling, progress in zip(valid.samplings, progresses, strict=True)
                ]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [(task.result(), each) for task, each in zip(tasks, progresses, strict=True)]

    async def _collect(
        self,
        valid: ValidRequest,
        sampling: SamplingParams,
        adapter: AdapterHandle,
        progress: SequenceProgress,
    ) -> Sequence:
        """Submit one sequence and read it to its end; it is cancelled if this call is."""
        sequence = Sequence(reported_seed(sampling))
        async with aclosing(self._submit(valid, sampling, adapter)) as chunks:
            async for chunk in chunks:
                progress.take(chunk)
                if chunk.finish is not FinishCode.RUNNING:
                    check_last(chunk)
                _append(sequence, chunk)
                if chunk.finish is not FinishCode.RUNNING:
                    return sequence
        raise IncompleteGenerationError


def _use(selection: AdapterSelection) -> AdapterUse:
    return AdapterUse(selection.ids, selection.refs[0].source, selection.label)


def _handle(lease: AdapterLease | None) -> AdapterHandle:
    return BASE_ADAPTER if lease is None else lease.handle


def _append(sequence: Sequence, chunk: TokenChunk) -> None:
    tokens = sequence.tokens
    tokens.ids += chunk.tokens.ids
    tokens.logprobs += chunk.tokens.logprobs
    tokens.texts += chunk.tokens.texts
    tokens.special += chunk.tokens.special
    sequence.alternatives += chunk.alternatives
    if chunk.prompt_tokens is not None:
        sequence.prompt_tokens = chunk.prompt_tokens
    sequence.finish = chunk.finish
    sequence.generated_text = chunk.generated_text or ""


def reported_seed(sampling: SamplingParams) -> int | None:
    """The seed that made the output what it is; None when nothing was drawn."""
    return sampling.seed if sampling.do_sample else None


def check_last(chunk: TokenChunk) -> None:
    """Raise the error of a last chunk that has one, or that lacks what a last chunk has."""
    if chunk.finish is FinishCode.ERROR:
        error = chunk.error
        if error is None:
            raise GenerationError("the engine gave no reason", public="")
        if isinstance(error, ShardError):
            raise GenerationError(str(error), public="a shard failed") from error
        raise error
    if chunk.generated_text is None or not chunk.tokens.ids:
        raise IncompleteGenerationError("the last chunk has no text or no token", public="")
