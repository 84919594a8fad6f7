"""Sends finished spans to a collector, in a thread of its own.

The SDK's variables count: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER,
OTEL_EXPORTER_OTLP_HEADERS and the rest. Spans that the collector does not take are lost, which is
said once; nothing waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace.span import TraceState

from lorax_contract.trace_ids import child_of, new_root
from lorax_contract.tracing import FinishedSpan, TraceContext

logger = logging.getLogger("lorax_telemetry")

_UNKNOWN_SERVICE = "unknown_service"
# Seconds that one delivery may take, and all that is left at the end.
_TIMEOUT_S = 5.0
_CLOSING_S = 2.0
_GIVING_UP_S = 0.5


def open_export(endpoint: str, process: str, **attributes: str | int) -> SpanExport:
    """Return where the spans of a process go: a collector that speaks OTLP.

    It is spoken to over gRPC, or over HTTP where OTEL_EXPORTER_OTLP_PROTOCOL says so.
    ``process`` is the last part of the service's name, unless a variable names that.
    """
    # What fails is said by us, once.
    sdk = logging.getLogger("opentelemetry")
    sdk.addHandler(logging.NullHandler())
    sdk.propagate = False
    return SpanExport(TellingExporter(_exporter(endpoint), endpoint), process, **attributes)


class SpanExport:
    """Makes the SDK's spans of finished ones and queues them; a SpanSink.

    Args:
        exporter: delivers them.
        process: the last part of the service's name, unless a variable names that.
    """

    def __init__(self, exporter: SpanExporter, process: str, **attributes: str | int) -> None:
        self._exporter = exporter
        self._ids = _GivenIds()
        self._provider = TracerProvider(
            resource=_resource(process, attributes),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        # Its queue is bounded; what is beyond is lost.
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("lorax")
        # Of the ids that are given next.
        self._lock = threading.Lock()

    def begin(self, parent: TraceContext | None) -> TraceContext | None:
        """Return the context of a request's span; None: it is not traced."""
        context = new_root() if parent is None else child_of(parent)
        try:
            sampled = self._provider.sampler.should_sample(
                _parent_of(parent), int(context.trace_id, 16), "generate", SpanKind.SERVER
            )
        except Exception:
            logger.exception("a request could not be traced")
            return None
        if sampled.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        return TraceContext(context.trace_id, context.span_id, True, context.state)

    def write(self, spans: Sequence[FinishedSpan]) -> None:
        """Queue spans that are over, each with its parent before it; from any thread."""
        try:
            with self._lock:
                for span in spans:
                    self._write(span)
        except Exception:
            logger.exception("spans could not be made")

    def _write(self, span: FinishedSpan) -> None:
        self._ids.next = span.context
        made = self._tracer.start_span(
            span.name,
            _parent_of(span.parent),
            SpanKind.SERVER if span.is_server else SpanKind.INTERNAL,
            attributes=dict(span.attributes),
            start_time=span.start_ns,
        )
        if span.error:
            made.set_status(Status(StatusCode.ERROR, span.error))
        made.end(max(span.end_ns, span.start_ns))

    def close(self) -> None:
        """Deliver what is queued, for a few seconds at most."""
        closing = threading.Thread(target=self._shut_down, name="last spans", daemon=True)
        closing.start()
        closing.join(_CLOSING_S)
        if closing.is_alive():
            # Gives up, and says so.
            self._exporter.shutdown()
            closing.join(_GIVING_UP_S)

    def _shut_down(self) -> None:
        with contextlib.suppress(Exception):
            self._provider.shutdown()


class TellingExporter(SpanExporter):
    """Says once when a collector takes no spans, and once when it does again.

    Args:
        inner: delivers them.
        endpoint: where to; for the log.
    """

    def __init__(self, inner: SpanExporter, endpoint: str) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._fails = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Deliver spans."""
        try:
            result, reason = self._inner.export(spans), ""
        except Exception as error:  # noqa: BLE001 - nobody but the log hears of it
            result, reason = SpanExportResult.FAILURE, f": {type(error).__name__}"
        fails = result is not SpanExportResult.SUCCESS
        if fails and not self._fails:
            logger.warning(
                "the collector at %s takes no spans%s; they are lost", self._endpoint, reason
            )
        elif self._fails and not fails:
            logger.info("the collector at %s takes spans again", self._endpoint)
        self._fails = fails
        return result

    def shutdown(self) -> None:
        """Give up what is being delivered."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing is kept here."""
        return True


class _GivenIds(IdGenerator):
    """Gives spans the ids that they were announced by."""

    def __init__(self) -> None:
        self.next = new_root()

    def generate_span_id(self) -> int:
        return int(self.next.span_id, 16)

    def generate_trace_id(self) -> int:
        return int(self.next.trace_id, 16)


def _parent_of(parent: TraceContext | None) -> Context:
    if parent is None:
        return Context()
    state = TraceState.from_header([parent.state]) if parent.state else None
    flags = TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT)
    context = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, flags, state)
    return set_span_in_context(NonRecordingSpan(context), Context())


def _resource(process: str, attributes: dict[str, str | int]) -> Resource:
    given = Resource.create({f"lorax.{name}": value for name, value in attributes.items()})
    if str(given.attributes.get(SERVICE_NAME, _UNKNOWN_SERVICE)).startswith(_UNKNOWN_SERVICE):
        return given.merge(Resource({SERVICE_NAME: f"lorax-{process}"}))
    return given


def _exporter(endpoint: str) -> SpanExporter:
    protocol = os.environ.get(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    )
    if protocol.startswith("http"):
        from opentelemetry.exporter.otlp.proto.http import trace_exporter as over_http

        has_path = urlsplit(endpoint).path.strip("/")
        url = endpoint if has_path else f"{endpoint.rstrip('/')}/v1/traces"
        return over_http.OTLPSpanExporter(endpoint=url, timeout=_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as over_grpc

    return over_grpc.OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT_S)
