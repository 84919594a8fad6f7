"""What is known of a request when it is over; its line in the log and its spans are made of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lorax_contract.errors import LoraxError
from lorax_contract.tracing import TraceContext
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.engine.row_cost import RowCost
from lorax_router.service.metrics.recorder import failure_label
from lorax_router.service.origin import NOWHERE, Origin
from lorax_router.service.requests import ValidRequest
from lorax_router.service.results import AdapterUse, Timings

# Phases of an adapter's way to the shards, beside which its request waits in the queue.
_LOADING = ("wait", "parse", "copy")


class Interval(NamedTuple):
    """A part of a request's time, in perf_counter seconds."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return max(self.end - self.start, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSummary:
    """One request, over. Holds lengths, times and names; of texts nothing is shown."""

    received_at: float
    ended_at: float
    origin: Origin = NOWHERE
    caller: Caller = ANYBODY
    is_stream: bool = False
    # None: it was found invalid, or nobody looked.
    valid: ValidRequest | None = field(default=None, repr=False)
    adapter: AdapterUse | None = None
    # Of the sequence that is shown first, like the first of the costs.
    timings: Timings | None = None
    finish_reason: str | None = None
    costs: tuple[RowCost, ...] = ()
    # Moments between which the adapter was looked for, and the prompt became tokens.
    resolving: tuple[float, float] | None = None
    tokenizing: tuple[float, float] | None = None
    # Of all sequences; tokens of the prompt that were in the cache are those of the one with least.
    num_generated: int = 0
    num_cached: int = 0
    num_accepted: int = 0
    error: BaseException | None = field(default=None, repr=False)
    # Whether it came no further than its reading: then its error may quote what it says.
    is_refused: bool = False
    # Of its span; None: it is not traced.
    trace: TraceContext | None = None
    trace_parent: TraceContext | None = None

    @property
    def outcome(self) -> str:
        """``ok``, or the label by which failures are counted."""
        return "ok" if self.error is None else failure_label(self.error)

    @property
    def status(self) -> str:
        """How it ended, by gRPC's name of it: the same whatever the dialect says."""
        if self.error is None:
            return "OK"
        if isinstance(self.error, LoraxError):
            return self.error.kind.grpc_status
        return "CANCELLED" if self.outcome == "dropped" else "INTERNAL"

    @property
    def shares_line(self) -> bool:
        """Whether others of its call that are answered at the same time have one line with it."""
        if self.valid is None or self.error is not None or self.trace is not None:
            return False
        return self.valid.output.pools and self.origin is not NOWHERE

    @property
    def cost(self) -> RowCost:
        """What the sequence took that is shown first."""
        return self.costs[0] if self.costs else RowCost()

    def phases(self) -> Iterator[Interval]:
        """Yield what its time went into, of the sequence that is shown first, as far as it came.

        ``validation``, ``queue``, ``prefill`` and ``decode`` follow each other; the others are
        within them.
        """
        timings = self.timings or Timings(self.received_at)
        moments = [self.received_at, timings.validated_at]
        moments.append(self.cost.scheduled_at or timings.scheduled_at)
        moments += [timings.first_token_at, timings.last_token_at]
        for name, start, end in zip(
            ("validation", "queue", "prefill", "decode"), moments, moments[1:]
        ):
            if not start:
                break
            yield Interval(name, start, end or self.ended_at)
            if not end:
                break
        if self.resolving is not None:
            yield Interval("adapter_fetch", *self.resolving)
        if self.tokenizing is not None:
            yield Interval("tokenization", *self.tokenizing)
        if loading_s := self._loading_s():
            yield Interval("adapter_load", timings.validated_at, timings.validated_at + loading_s)
        for lost_at, back_at in self.cost.recoveries:
            yield Interval("recovery", lost_at, back_at)

    def _loading_s(self) -> float:
        """Return the seconds of the adapter's way from the disk to the shards."""
        phases = {} if self.adapter is None else self.adapter.phases
        return sum(phases.get(name, 0.0) for name in _LOADING)
