"""W3C's headers are read as that says, and a collector's address as it is meant."""

from __future__ import annotations

import pytest

from lorax_contract import otlp
from lorax_contract.config import ConfigError, RouterConfig
from lorax_contract.otlp import endpoint_problem
from lorax_contract.trace_ids import child_of, new_root
from lorax_contract.tracing import TraceContext, read_context

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "is_sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True), (f"00-{TRACE}-{SPAN}-00", False), (f"00-{TRACE}-{SPAN}-03", True),
        # Of a later version what is known is read.
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", True), (f" 00-{TRACE}-{SPAN}-01 ", True),
    ],
)  # fmt: skip
def test_a_header_that_holds_is_read(header: str, is_sampled: bool) -> None:
    assert read_context(header) == TraceContext(TRACE, SPAN, is_sampled)


@pytest.mark.parametrize(
    "header",
    [
        "", "nonsense", f"00-{TRACE}-{SPAN}", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}-01\n00",
    ],
)  # fmt: skip
def test_a_header_that_does_not_hold_is_none(header: str) -> None:
    assert read_context(header) is None


def test_what_travels_along_is_handed_on_if_it_holds() -> None:
    for state, kept in (("a=1, b=2", "a=1, b=2"), ("x" * 513, ""), ("a=\x00", ""), ("é=1", "")):
        found = read_context(f"00-{TRACE}-{SPAN}-01", state)
        assert found is not None
        assert (found.state, child_of(found).state) == (kept, kept)


def test_contexts_are_written_as_they_are_read() -> None:
    context = new_root()
    assert read_context(context.traceparent) == context
    child = child_of(context)
    assert child.trace_id == context.trace_id
    assert child.span_id != context.span_id


@pytest.mark.parametrize(
    "url", ["http://localhost:4317", "https://collector.example", "http://c:4318/v1/traces"]
)
def test_an_address_of_a_collector_is_taken(url: str) -> None:
    assert endpoint_problem(url) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:4317", "http://localhost:4317"), ("", "http://localhost:4317"),
        ("grpc://there:1", "no address"), ("http://", "no address"),
        ("http://me:pass@there", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused_in_words(url: str, words: str) -> None:
    problem = endpoint_problem(url)
    assert problem is not None
    assert words in problem
    assert "pass@" not in problem


def test_without_the_extra_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'otlp_endpoint: .*pip install "lorax-py\[otel\]"'):
        RouterConfig(model_id="m", tokenizer_dir="", shard_uri="", otlp_endpoint="http://there")
    RouterConfig(model_id="m", tokenizer_dir="", shard_uri="")
