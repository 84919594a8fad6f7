"""Where a request's time went adds up, in its line and in its spans, which tell no secret."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from tests.helpers.http_app import World
from tests.helpers.in_loop import in_loop
from tests.helpers.scripted_engine import ScriptedEngine, failure, words

from lorax_contract.errors import GenerationError, OverloadedError
from lorax_contract.tracing import FinishedSpan, TraceContext
from lorax_router.service.accounts.ledger import RequestLedger
from lorax_router.service.accounts.log_line import line_of
from lorax_router.service.accounts.request_spans import spans_of
from lorax_router.service.accounts.summary import RequestSummary
from lorax_router.service.callers import Caller
from lorax_router.service.engine.row_cost import RowCost
from lorax_router.service.origin import Origin
from lorax_router.service.requests import GenerateParameters, GenerateRequest, TextPrompt
from lorax_router.service.results import AdapterUse, Timings

TRACE = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
OWN = TraceContext(TRACE.trace_id, "1111111111111111")
ORIGIN = Origin(protocol="http", call="/generate", traceparent=TRACE.traceparent)
LOST = RowCost(scheduled_at=2.0, num_returns=1, recoveries=[(4.0, 7.0)], num_drafted=9)


def summary(**overrides: Any) -> RequestSummary:
    """A request with an adapter whose shards were lost while it was decoded."""
    adapter = AdapterUse("poet", "hub", "poet", phases={"resolve": 0.2, "wait": 0.25, "copy": 0.25})
    values: dict[str, Any] = {
        "received_at": 1.0, "ended_at": 9.0, "costs": (LOST,), "adapter": adapter,
        "timings": Timings(1.0, 0.2, 1.5, 2.0, 3.0, 9.0), "resolving": (1.1, 1.3),
        "tokenizing": (1.3, 1.5), "num_generated": 20, "num_cached": 4, "num_accepted": 5,
        "finish_reason": "length", "trace": OWN, "trace_parent": TRACE,
    }  # fmt: skip
    return RequestSummary(**{**values, **overrides})


def test_the_costs_of_a_line_come_to_the_whole() -> None:
    line = line_of(summary())
    costs = [line[f"{name}_ms"] for name in ("validation", "queue", "prefill", "decode")]
    assert costs == [500.0, 500.0, 1000.0, 6000.0]
    assert sum(costs) == line["total_ms"]
    assert (line["tokenization_ms"], line["adapter_ms"], line["recovery_ms"]) == (
        200.0,
        700.0,
        3000.0,
    )
    counts = {name: line[name] for name in ("cached_tokens", "drafted_tokens", "accepted_tokens")}
    assert counts == {"cached_tokens": 4, "drafted_tokens": 9, "accepted_tokens": 5}
    assert (line["preemptions"], line["restarts"], line["status"]) == (1, 1, "OK")


@pytest.mark.parametrize(
    ("timings", "scheduled_at", "last"),
    [
        (Timings(1.0), 0.0, "validation"), (Timings(1.0, 0.0, 1.5), 0.0, "queue"),
        (Timings(1.0, 0.0, 1.5), 2.0, "prefill"), (Timings(1.0, 0.0, 1.5, 2.0, 3.0, 4.0), 2.0, "decode"),
    ],
)  # fmt: skip
def test_one_that_ends_early_has_the_phases_that_it_came_to(
    timings: Timings, scheduled_at: float, last: str
) -> None:
    error = asyncio.CancelledError()
    found = summary(timings=timings, costs=(RowCost(scheduled_at),), adapter=None, resolving=None,
                    tokenizing=None, error=error)  # fmt: skip
    phases = [*found.phases()]
    assert phases[-1].name == last
    assert all(before.end == after.start for before, after in pairwise(phases))
    assert phases[-1].end == (4.0 if last == "decode" else 9.0)
    assert (found.outcome, found.status) == ("dropped", "CANCELLED")


def test_spans_have_the_moments_of_the_line() -> None:
    root, *parts = spans_of(summary(), "base")
    assert (root.name, root.context, root.parent, root.error) == ("generate base", OWN, TRACE, "")
    assert all(each.parent == OWN for each in parts)
    assert len({each.context.span_id for each in (root, *parts)}) == len(parts) + 1
    took = {each.name: round((each.end_ns - each.start_ns) / 1e6) for each in parts}
    assert took == {
        "validation": 500, "queue": 500, "prefill": 1000, "decode": 6000, "adapter_fetch": 200,
        "tokenization": 200, "adapter_load": 500, "recovery": 3000,
    }  # fmt: skip
    assert root.attributes["lorax.adapter"] == root.attributes["gen_ai.request.model"] == "poet"
    assert root.attributes["gen_ai.response.model"] == "base"
    assert (root.attributes["lorax.restarts"], root.attributes["lorax.preemptions"]) == (1, 1)


class Kept:
    """Traces whoever has a parent, and keeps what is written; a SpanSink."""

    def __init__(self) -> None:
        self.spans: list[FinishedSpan] = []
        self.is_closed = False

    def begin(self, parent: TraceContext | None) -> TraceContext | None:
        return None if parent is None else OWN

    def write(self, spans: Sequence[FinishedSpan]) -> None:
        self.spans += spans

    def close(self) -> None:
        self.is_closed = True


def traced(world: World) -> Kept:
    kept = Kept()
    world.service.ledger = RequestLedger(world.metrics, kept, "base")
    return kept


def asking(origin: Origin = ORIGIN, **parameters: Any) -> GenerateRequest:
    return GenerateRequest(
        prompt=TextPrompt("w17"), parameters=GenerateParameters(api_token="hf_secret", **parameters),
        caller=Caller(tenant="ant"), origin=origin,
    )  # fmt: skip


@in_loop
async def test_a_traced_request_tells_the_shards_of_its_span_and_its_line_of_its_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    world = World(engine=ScriptedEngine(lambda spec: words(" w8", " w9")))
    kept = traced(world)
    await world.service.generate(asking(temperature=0.5, max_new_tokens=2))
    await world.service.generate(asking(Origin(protocol="http", call="/generate")))
    assert [each.trace for each in world.engine.submitted] == [OWN, None]
    lines = [each.fields for each in caplog.records if each.name == "lorax_router.request"]  # type: ignore[attr-defined]
    assert [each.get("trace_id") for each in lines] == [TRACE.trace_id, None]
    (root,) = [each for each in kept.spans if each.is_server]
    about = root.attributes
    assert about["gen_ai.request.temperature"] == 0.5
    assert (about["gen_ai.usage.input_tokens"], about["gen_ai.usage.output_tokens"]) == (2, 2)
    assert (about["lorax.tenant"], about["gen_ai.operation.name"]) == ("ant", "text_completion")
    told = repr(kept.spans)
    assert not [secret for secret in ("w17", "w8", "hf_secret") if secret in told]
    world.service.ledger.close()
    assert kept.is_closed


@in_loop
async def test_what_fails_and_what_is_refused_is_in_its_trace() -> None:
    world = World(engine=ScriptedEngine(lambda spec: failure(GenerationError("broke"))))
    kept = traced(world)
    with pytest.raises(GenerationError):
        await world.service.generate(asking())
    world.service.ledger.request_refused(OverloadedError("no place"), origin=ORIGIN)
    roots = [each for each in kept.spans if each.is_server]
    assert [each.error for each in roots] == ["generation", "overloaded"]
    assert [each.attributes["error.type"] for each in roots] == ["generation", "overloaded"]
