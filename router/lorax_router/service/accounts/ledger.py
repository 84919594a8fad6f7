"""Opens the accounts of requests, and closes each with one line in the log and its spans.

The metrics know how many there are; nobody else makes such lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from time import perf_counter

from lorax_contract.tracing import SpanSink, TraceContext, read_context
from lorax_router.service.accounts.log_line import write_line, write_shared_line
from lorax_router.service.accounts.request_spans import spans_of
from lorax_router.service.accounts.summary import RequestSummary
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.origin import NOWHERE, Origin

# Refusals have a line each up to so many in a second, the rest of that second one for each kind.
_LINES_A_SECOND = 20
_SECOND = 1.0


class RequestLedger:
    """Keeps the accounts of one router; a RequestCounts.

    Args:
        metrics: counts all of them.
        spans: takes the spans of those that are traced; None: none is.
        model: the base's name, for spans.
    """

    def __init__(self, metrics: Metrics, spans: SpanSink | None = None, model: str = "") -> None:
        self.metrics = metrics
        self._spans = spans
        self._model = model
        self._refusals = _Refusals(self._settle)
        self._answers = _AnswersOfCalls(write_shared_line)

    def begin_trace(self, origin: Origin) -> tuple[TraceContext | None, TraceContext | None]:
        """Return the context of a request's span, None if it is not traced, and of whose child it is."""
        if self._spans is None:
            return None, None
        parent = read_context(origin.traceparent, origin.tracestate)
        return self._spans.begin(parent), parent

    def settle(self, summary: RequestSummary) -> None:
        """Write what came of a request that the service had; called once for each."""
        if summary.shares_line:
            self._answers.add(summary)
        else:
            self._settle(summary, 1)

    def _settle(self, summary: RequestSummary, num_requests: int) -> None:
        write_line(summary, num_requests)
        if self._spans is not None and summary.trace is not None:
            self._spans.write([*spans_of(summary, self._model)])

    def request_refused(
        self, error: BaseException, caller: Caller = ANYBODY, origin: Origin = NOWHERE
    ) -> None:
        """A request ended before the service had it: there was no place, or its body was at fault."""
        self.metrics.request_refused(error, caller.tenant)
        trace, parent = self.begin_trace(origin)
        now = perf_counter()
        self._refusals.add(
            RequestSummary(
                received_at=now, ended_at=now, origin=origin, caller=caller, error=error,
                is_refused=True, trace=trace, trace_parent=parent,
            )
        )  # fmt: skip

    def unknown_fields(self, count: int) -> None:
        """A request body had so many fields that nobody reads."""
        self.metrics.unknown_fields(count)

    def close(self) -> None:
        """Write the lines that wait for others, and deliver the spans."""
        self._refusals.flush()
        self._answers.flush()
        if self._spans is not None:
            self._spans.close()


class _Refusals:
    """Bounds what a flood writes: few lines a second, which tell of all.

    Args:
        settle: takes the account of a refused request, and how many are alike.
    """

    def __init__(self, settle: Callable[[RequestSummary, int], None]) -> None:
        self._settle = settle
        self._second = 0.0
        self._num_lines = 0
        # By kind: one of those that have no line of their own, and their number.
        self._alike: dict[Hashable, tuple[RequestSummary, int]] = {}

    def add(self, summary: RequestSummary) -> None:
        """Take a request that was refused."""
        if summary.ended_at - self._second >= _SECOND:
            self.flush()
            self._second, self._num_lines = summary.ended_at, 0
        if self._num_lines < _LINES_A_SECOND:
            self._num_lines += 1
            self._settle(summary, 1)
            return
        if not self._alike:
            asyncio.get_running_loop().call_later(_SECOND, self.flush)
        kind = summary.outcome, summary.status, summary.caller.tenant
        _, number = self._alike.get(kind, (None, 0))
        # Of one request they tell nothing: what is alike is told.
        shared = replace(summary, origin=NOWHERE, trace=None, trace_parent=None)
        self._alike[kind] = shared, number + 1

    def flush(self) -> None:
        """Write the lines of those that have none of their own."""
        alike, self._alike = self._alike, {}
        for summary, number in alike.values():
            self._settle(summary, number)


class _AnswersOfCalls:
    """Collects what calls of many requests are answered with at the same time.

    One pass answers most of them: within the same turn of the event loop.

    Args:
        write: takes the accounts of requests of one call.
    """

    def __init__(self, write: Callable[[Sequence[RequestSummary]], None]) -> None:
        self._write = write
        # By the identity of a call's origin.
        self._ended: dict[int, list[RequestSummary]] = {}

    def add(self, summary: RequestSummary) -> None:
        """Take a request that was answered."""
        if not self._ended:
            asyncio.get_running_loop().call_soon(self.flush)
        self._ended.setdefault(id(summary.origin), []).append(summary)

    def flush(self) -> None:
        """Write one line for each call."""
        ended, self._ended = self._ended, {}
        for summaries in ended.values():
            self._write(summaries)
