"""A collector that keeps the spans which are sent to it by OTLP over gRPC or HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2 as pb,
)
from opentelemetry.proto.collector.trace.v1 import (
    trace_service_pb2_grpc as pb_grpc,
)


@dataclass(frozen=True)
class Received:
    """One span as it came."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    start_ns: int
    end_ns: int
    is_server: bool
    is_error: bool
    attributes: dict[str, Any]


class Collector:
    """Listens on the loopback interface; a context manager."""

    def __init__(self) -> None:
        self.headers: list[dict[str, str]] = []
        self._spans: list[Received] = []
        self._came = threading.Condition()
        self.url = ""

    @property
    def spans(self) -> list[Received]:
        """What came so far."""
        with self._came:
            return [*self._spans]

    def wait_for(
        self, is_enough: Callable[[list[Received]], bool], timeout_s: float = 30.0
    ) -> list[Received]:
        """Return the spans once they are enough."""
        end = time.monotonic() + timeout_s
        with self._came:
            while not is_enough(self._spans):
                left = end - time.monotonic()
                assert left > 0, [(each.service, each.name) for each in self._spans]
                self._came.wait(left)
            return [*self._spans]

    def take(self, request: pb.ExportTraceServiceRequest, headers: dict[str, str]) -> None:
        """Keep what a delivery has."""
        with self._came:
            self.headers.append(headers)
            for resource in request.resource_spans:
                service = _values(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self._spans += [_received(service, span) for span in scope.spans]
            self._came.notify_all()

    def __enter__(self) -> Self:
        self._server = grpc.server(ThreadPoolExecutor(2))
        pb_grpc.add_TraceServiceServicer_to_server(_Servicer(self), self._server)
        self.url = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


class HttpCollector(Collector):
    """The same over HTTP."""

    def __enter__(self) -> Self:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(pb.ExportTraceServiceRequest.FromString(body), dict(self.headers))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Servicer(pb_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: Any
    ) -> pb.ExportTraceServiceResponse:
        self._collector.take(request, dict(context.invocation_metadata()))
        return pb.ExportTraceServiceResponse()


def _received(service: str, span: Any) -> Received:
    return Received(
        service, span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
        span.trace_state, span.start_time_unix_nano, span.end_time_unix_nano,
        span.kind == span.SPAN_KIND_SERVER, span.status.code == span.status.STATUS_CODE_ERROR,
        _values(span.attributes),
    )  # fmt: skip


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
