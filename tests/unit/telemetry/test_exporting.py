"""Spans reach a collector as they are, and nothing else ever notices that they do not."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from tests.helpers.otlp_collector import Collector, HttpCollector
from tests.helpers.server import free_port

from lorax_contract.trace_ids import child_of, new_root
from lorax_contract.tracing import FinishedSpan, TraceContext, read_context
from lorax_telemetry.exporting import SpanExport, TellingExporter, open_export

PARENT = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", state="gateway=7")


def span(context: TraceContext, parent: TraceContext | None = None, **more: object) -> FinishedSpan:
    values = {"name": "generate", "start_ns": 1_000, "end_ns": 2_000, **more}
    return FinishedSpan(context=context, parent=parent, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Collector, HttpCollector], ids=["grpc", "http"])
def test_spans_arrive_with_the_ids_by_which_they_were_announced(
    kind: type[Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is HttpCollector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=7")
    with kind() as collector:
        export = open_export(collector.url, "router")
        root = export.begin(PARENT)
        assert root is not None
        part = child_of(root)
        about = {"number": 7, "text": "x", "list": ("a", "b")}
        export.write([
            span(root, PARENT, is_server=True, attributes=about), span(part, root, error="generation"),
        ])  # fmt: skip
        export.close()
        first, second = sorted(collector.spans, key=lambda each: each.is_error)
    assert (first.trace_id, first.span_id) == (PARENT.trace_id, root.span_id)
    assert (first.parent_id, first.state, first.is_server) == (PARENT.span_id, "gateway=7", True)
    assert (first.start_ns, first.end_ns, first.service) == (1_000, 2_000, "lorax-router")
    assert first.attributes == {"number": 7, "text": "x", "list": ["a", "b"]}
    assert (second.span_id, second.parent_id) == (part.span_id, root.span_id)
    assert {name.lower(): value for name, value in collector.headers[0].items()}["api-key"] == "7"


def test_the_sdks_variables_name_the_service_and_choose_what_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with Collector() as collector:
        export = open_export(collector.url, "shard", rank=1)
        assert export.begin(None) is None
        context = export.begin(PARENT)
        assert context is not None
        export.write([span(context, PARENT)])
        export.close()
        (found,) = collector.spans
    assert found.service == "mine"


def test_a_parent_that_is_not_sampled_has_no_children() -> None:
    export = SpanExport(_Deaf(), "router")
    unsampled = read_context(PARENT.traceparent.removesuffix("01") + "00")
    assert unsampled is not None
    assert export.begin(unsampled) is None
    own = export.begin(None)
    assert own is not None and own.is_sampled
    export.close()


class _Deaf(SpanExporter):
    """Takes as long as it is let."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.go_on.wait(60)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.go_on.set()


def test_a_collector_that_hangs_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    export = SpanExport(TellingExporter(_Deaf(), "http://there"), "router")
    for _ in range(5_000):
        export.write([span(new_root())])
    started = time.monotonic()
    export.close()
    # What it would have waited for is a minute.
    assert time.monotonic() - started < 30
    assert len([each for each in caplog.records if "takes no spans" in each.message]) == 1


class _Moody(SpanExporter):
    def __init__(self) -> None:
        self.answers: list[SpanExportResult | Exception] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_each_failure_of_the_collector_is_said_once_and_its_end_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    inner = _Moody()
    exporter = TellingExporter(inner, "http://there")
    bad, good = SpanExportResult.FAILURE, SpanExportResult.SUCCESS
    inner.answers = [good, bad, OSError("secret"), bad, good, good, bad]
    for _ in range(7):
        exporter.export([])
    said = [each.message for each in caplog.records if each.name == "lorax_telemetry"]
    assert [("no spans" in each) for each in said] == [True, False, True]
    assert "secret" not in repr(said)


ALONE = """
import logging, sys
from lorax_contract.trace_ids import new_root
from lorax_contract.tracing import FinishedSpan
from lorax_telemetry.exporting import open_export
logging.basicConfig(level="DEBUG", stream=sys.stdout)
export = open_export(sys.argv[1], "router")
export.write([FinishedSpan(name="x", context=new_root(), parent=None, start_ns=1, end_ns=2)])
export.close()
"""


def test_a_collector_that_is_not_there_is_said_once_and_the_sdk_says_nothing() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, url], capture_output=True, text=True, timeout=60
    )
    (line,) = done.stdout.splitlines()
    assert f"the collector at {url} takes no spans" in line
