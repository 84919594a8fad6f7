"""What one request took: fed while it runs, written to metrics and log once, at its end."""

from __future__ import annotations

import asyncio
import logging
from time import perf_counter
from typing import Any

from lorax_contract.activation import NEVER
from lorax_contract.errors import DeadlineError, LoraxError, QuotaError, RequestError
from lorax_contract.step import FinishCode
from lorax_router.service.adapters.directory import AdapterLease
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.keys.meters import UNMETERED, TenantMeter
from lorax_router.service.metrics.recorder import Metrics, failure_label
from lorax_router.service.requests import ValidRequest
from lorax_router.service.results import FINISH_REASONS, NOT_INVOKED, AdapterUse, Timings

logger = logging.getLogger("lorax_router.request")


# What is no fault of the server's, and may come often.
_EXPECTED = (RequestError, QuotaError, DeadlineError, asyncio.CancelledError)


class SequenceProgress:
    """How far one sequence is; counts its tokens into the metrics, if there are any."""

    __slots__ = (
        "_meter",
        "_metrics",
        "_num_prompt",
        "adapter",
        "finish",
        "num_cached",
        "num_generated",
        "num_skipped",
        "timings",
    )

    def __init__(
        self,
        timings: Timings,
        metrics: Metrics | None,
        adapter: AdapterUse | None = None,
        *,
        num_prompt: int = 0,
        meter: TenantMeter = UNMETERED,
    ) -> None:
        self._meter = meter
        self.timings = timings
        # Shared by the sequences of one request.
        self.adapter = adapter
        self.num_generated = 0
        # Tokens that came in a step with an earlier one.
        self.num_skipped = 0
        # Tokens of the prompt that were in the cache.
        self.num_cached = 0
        self.finish = FinishCode.RUNNING
        self._metrics = metrics
        self._num_prompt = num_prompt

    def take(self, chunk: TokenChunk) -> None:
        """Count a chunk. Called for each token of each stream: keep it cheap."""
        num = len(chunk.tokens.ids)
        if not num and chunk.finish in (FinishCode.RUNNING, FinishCode.ERROR):
            return
        timings, metrics = self.timings, self._metrics
        if chunk.adapter_phases is not None and self.adapter is not None:
            self.adapter.phases.update(chunk.adapter_phases)
        if not self.num_generated:
            timings.scheduled_at = chunk.scheduled_at
            self.num_cached = chunk.num_cached_tokens
            timings.first_token_at = chunk.received_at
            if metrics is not None:
                metrics.prompt_computed(
                    timings.first_token_s, num_prompt=self._num_prompt, num_tokens=num
                )
        elif num and metrics is not None:
            gap = chunk.received_at - timings.last_token_at
            metrics.observe_inter_token(gap / num, num)
        timings.last_token_at = chunk.received_at
        self.num_generated += num
        if num > 1:
            self.num_skipped += num - 1
        self._meter.generated(num)
        self.finish = chunk.finish


class RequestRecord:
    """The account of one request, from its receipt to the one line in the log."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        is_stream: bool,
        caller: Caller = ANYBODY,
        meter: TenantMeter = UNMETERED,
    ) -> None:
        self._metrics = metrics
        self._is_stream = is_stream
        self._caller = caller
        # What the caller's tenant takes is counted here.
        self.meter = meter
        self.received_at = perf_counter()
        self._validated_at = 0.0
        self._resolving_s = 0.0
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

    def show(self, numbers: list[int]) -> None:
        """The client gets these sequences, in this order."""
        others = [n for n in range(len(self.sequences)) if n not in numbers]
        self.sequences = [self.sequences[number] for number in numbers + others]

    def _new_progress(self) -> SequenceProgress:
        timings = Timings(self.received_at, self._resolving_s, self._validated_at)
        num_prompt = 0 if self._valid is None else self._valid.num_prompt_tokens
        return SequenceProgress(
            timings, self._metrics, self.adapter, num_prompt=num_prompt, meter=self.meter
        )

    def selections(self, use: AdapterUse) -> None:
        """The request wants an adapter, which may not exist."""
        self.adapter = use

    def resolved(self, lease: AdapterLease, seconds: float) -> None:
        """The request's adapter is known; to find and fetch it took so long."""
        self._resolving_s = seconds
        assert self.adapter is not None
        self.adapter.was_found = True
        self.adapter.is_private = lease.is_private
        self.adapter.label = lease.label
        self.adapter.phases.update(lease.phases)

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
        else:
            self._metrics.request_failed(
                error, was_valid=self._valid is not None, tenant=self._caller.tenant
            )
        self._log(error)

    def _log(self, error: BaseException | None) -> None:
        outcome = "ok" if error is None else failure_label(error)
        is_fault = not (error is None or isinstance(error, _EXPECTED))
        level = logging.WARNING if is_fault else logging.INFO
        if logger.isEnabledFor(level):
            fields = self._fields(outcome, error)
            logger.log(level, "request ended: %s", outcome, extra={"fields": fields})

    def _fields(self, outcome: str, error: BaseException | None) -> dict[str, Any]:
        """Lengths and times, never a prompt or a token."""
        fields: dict[str, Any] = {"outcome": outcome, "stream": self._is_stream}
        if self._caller.has_key:
            fields |= {"tenant": self._caller.tenant, "priority": self._caller.priority}
        if self._valid is not None:
            fields["prompt_tokens"] = self._valid.num_prompt_tokens
            fields["max_new_tokens"] = self._valid.stopping.max_new_tokens
            fields["sequences"] = len(self._valid.samplings)
        if self.adapter is not None:
            fields["adapter"] = self.adapter.label
            for phase, seconds in self.adapter.phases.items():
                fields[f"adapter_{phase}_ms"] = round(seconds * 1e3, 3)
        timings = self.timings
        fields["generated_tokens"] = self.num_generated
        if error is None:
            fields["finish_reason"] = FINISH_REASONS.get(self.sequences[0].finish)
        for name in ("validation", "queue", "first_token", "inference", "total"):
            fields[f"{name}_ms"] = round(getattr(timings, f"{name}_s") * 1e3, 3)
        if isinstance(error, LoraxError):
            fields["error"] = str(error)
        return fields
