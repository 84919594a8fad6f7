"""What one request took: fed while it runs, written to metrics and log once, at its end."""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter

from lorax_contract.activation import NEVER
from lorax_router.service.accounts.ledger import RequestLedger
from lorax_router.service.accounts.progress import SequenceProgress
from lorax_router.service.accounts.summary import RequestSummary
from lorax_router.service.adapters.directory import AdapterLease
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.engine.row_cost import RowCost
from lorax_router.service.keys.meters import UNMETERED, TenantMeter
from lorax_router.service.origin import NOWHERE, Origin
from lorax_router.service.requests import ValidRequest
from lorax_router.service.results import FINISH_REASONS, NOT_INVOKED, AdapterUse, Timings


class RequestRecord:
    """The account of one request, from its receipt to the one line in the log."""

    def __init__(
        self,
        ledger: RequestLedger,
        *,
        is_stream: bool,
        caller: Caller = ANYBODY,
        meter: TenantMeter = UNMETERED,
        origin: Origin = NOWHERE,
    ) -> None:
        self._ledger = ledger
        self._metrics = metrics = ledger.metrics
        self.is_stream = is_stream
        self._origin = origin
        # None: it is not traced.
        self.trace, self._trace_parent = ledger.begin_trace(origin)
        self._caller = caller
        # What the caller's tenant takes is counted here.
        self.meter = meter
        self.received_at = perf_counter()
        self._validated_at = 0.0
        # From when to when its adapter was looked for, and its prompt became tokens.
        self._resolving: tuple[float, float] | None = None
        self._tokenizing: tuple[float, float] | None = None
        self._valid: ValidRequest | None = None
        self.adapter: AdapterUse | None = None
        # One each; those that the client gets come first once that is known.
        self.sequences = [self._new_progress()]
        metrics.request_received()

    @property
    def num_cached(self) -> int:
        """Tokens of the prompt that were in the cache, for whichever sequence found least."""
        return min(each.num_cached for each in self.sequences)

    @property
    def num_skipped(self) -> int:
        """Tokens that came in a step with an earlier one, of all sequences."""
        return sum(each.num_skipped for each in self.sequences)

    @property
    def timings(self) -> Timings:
        """Of the sequence that is shown first."""
        return self.sequences[0].timings

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, of all sequences."""
        return sum(each.num_generated for each in self.sequences)

    def follow(self, costs: Iterable[RowCost]) -> None:
        """The sequences are in the engine, which counts what they take."""
        for sequence, cost in zip(self.sequences, costs, strict=True):
            sequence.cost = cost

    def show(self, numbers: list[int]) -> None:
        """The client gets these sequences, in this order."""
        others = [n for n in range(len(self.sequences)) if n not in numbers]
        self.sequences = [self.sequences[number] for number in numbers + others]

    def _new_progress(self) -> SequenceProgress:
        started_at, found_at = self._resolving or (0.0, 0.0)
        timings = Timings(self.received_at, found_at - started_at, self._validated_at)
        num_prompt = 0 if self._valid is None else self._valid.num_prompt_tokens
        return SequenceProgress(
            timings, self._metrics, self.adapter, num_prompt=num_prompt, meter=self.meter
        )

    def selections(self, use: AdapterUse) -> None:
        """The request wants an adapter, which may not exist."""
        self.adapter = use

    def resolved(self, lease: AdapterLease, started_at: float) -> None:
        """The request's adapter is known; it was looked for since then."""
        self._resolving = started_at, perf_counter()
        assert self.adapter is not None
        self.adapter.was_found = True
        self.adapter.is_private = lease.is_private
        self.adapter.label = lease.label
        self.adapter.phases.update(lease.phases)

    def tokenized(self, started_at: float) -> None:
        """The request's prompt is tokens; it was waited for since then."""
        self._tokenizing = started_at, perf_counter()

    def validated(self, valid: ValidRequest) -> None:
        """The request is valid and has tokens; raises QuotaError when its tenant may not run it."""
        self.meter.start_prompt(valid.num_prompt_tokens)
        self._valid = valid
        if self.adapter is not None and valid.adapter_start == NEVER:
            self.adapter.warning = NOT_INVOKED
        self._validated_at = perf_counter()
        self.sequences = [self._new_progress() for _ in valid.samplings]
        self._metrics.request_validated(
            seconds=self.timings.validation_s,
            num_prompt=valid.num_prompt_tokens,
            max_new_tokens=valid.stopping.max_new_tokens,
        )

    def close(self, error: BaseException | None) -> None:
        """Write the outcome; called once."""
        if self._caller.has_key:
            self._metrics.tenants.ended(
                self._caller.tenant,
                num_prompt=0 if self._valid is None else self._valid.num_prompt_tokens,
                num_generated=self.num_generated,
                failed=error is not None,
            )
        if self.adapter is not None:
            self._metrics.adapter_used(self.adapter, self.num_generated, failed=error is not None)
        if error is None:
            self._count_success()
        else:
            self._metrics.request_failed(
                error, was_valid=self._valid is not None, tenant=self._caller.tenant
            )
        self._ledger.settle(self._summary(error))

    def _count_success(self) -> None:
        assert self._valid is not None
        first = self.sequences[0]
        self._metrics.request_succeeded(
            self._valid,
            timings=first.timings,
            finish=first.finish,
            num_generated=self.num_generated,
            num_of_first=first.num_generated,
            num_skipped=self.num_skipped,
        )

    def _summary(self, error: BaseException | None) -> RequestSummary:
        first = self.sequences[0]
        # Of an answer that is whole the last token is the end, whenever its client has read it.
        is_whole = error is None and first.timings.last_token_at
        return RequestSummary(
            received_at=self.received_at,
            ended_at=first.timings.last_token_at if is_whole else perf_counter(),
            origin=self._origin,
            caller=self._caller,
            is_stream=self.is_stream,
            valid=self._valid,
            adapter=self.adapter,
            timings=first.timings,
            finish_reason=FINISH_REASONS.get(first.finish),
            costs=tuple(each.cost for each in self.sequences),
            resolving=self._resolving,
            tokenizing=self._tokenizing,
            num_generated=self.num_generated,
            num_cached=self.num_cached,
            num_accepted=self.num_skipped,
            error=error,
            trace=self.trace,
            trace_parent=self._trace_parent,
        )
