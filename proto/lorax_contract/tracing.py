"""Spans as values: what router and shards tell of traced requests. Needs no package that traces.

A context is what W3C's headers say of a span. Whoever gets one and is sampled makes children of
it, and hands it on; ``SpanSink`` is where finished spans go.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

AttributeValue = str | bool | int | float | Sequence[str]

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
# As many characters as everybody has to hand on; the printable ones.
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span's place: its trace, itself, and what else travels along."""

    # 32 and 16 hexadecimal digits.
    trace_id: str
    span_id: str
    is_sampled: bool = True
    # Of other tracing systems, by which the request came; handed on as it is.
    state: str = ""

    @property
    def traceparent(self) -> str:
        """The same as the header has it."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.is_sampled):02x}"


def read_context(traceparent: str, tracestate: str = "") -> TraceContext | None:
    """Return what the headers of a call say; None: nothing that holds.

    A ``tracestate`` that does not hold is left out, as is said there.
    """
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if (
        version == "ff"
        or (version == "00" and rest)
        or not (int(trace_id, 16) and int(span_id, 16))
    ):
        return None
    state = tracestate if _TRACESTATE.fullmatch(tracestate) else ""
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & 1), state)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedSpan:
    """One span, over. Moments are nanoseconds since 1970."""

    name: str
    context: TraceContext
    # None: it begins its trace.
    parent: TraceContext | None
    start_ns: int
    end_ns: int
    # Whether it answers a call from outside; else it is a part of one that does.
    is_server: bool = False
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    # Why it failed, as a word; "": it did not.
    error: str = ""


class SpanSink(Protocol):
    """Where spans go. None of its methods raises; only ``close`` waits."""

    def begin(self, parent: TraceContext | None) -> TraceContext | None:
        """Return the context of a request's span; None: it is not traced."""

    def write(self, spans: Sequence[FinishedSpan]) -> None:
        """Take spans that are over, each with its parent before it; from any thread."""

    def close(self) -> None:
        """Deliver what was taken, as far as that goes within seconds."""
