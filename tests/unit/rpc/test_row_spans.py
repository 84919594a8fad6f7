"""A traced row has a span for its prefill and one for its decode, each time that it is in the shard."""

from __future__ import annotations

from collections.abc import Sequence

from lorax_contract.step import (
    FinishCode,
    NewRow,
    RequestId,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StepPlan,
    StoppingParams,
)
from lorax_contract.tracing import FinishedSpan, TraceContext
from lorax_shard.rpc.row_spans import RowSpans

TRACE = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")
ONE, OTHER = RequestId(1), RequestId(2)


class Kept:
    """Keeps what is written; a SpanSink."""

    def __init__(self) -> None:
        self.spans: list[FinishedSpan] = []

    def begin(self, parent: TraceContext | None) -> TraceContext | None:
        return parent

    def write(self, spans: Sequence[FinishedSpan]) -> None:
        self.spans += spans

    def close(self) -> None:
        """Nothing waits."""


def row(
    request_id: RequestId, trace: TraceContext | None, past: int = 0, cached: int = 0
) -> NewRow:
    spec = RequestSpec(
        request_id=request_id, prompt_ids=[1, 2, 3], sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=9), trace=trace,
    )  # fmt: skip
    return NewRow(spec, [7] * past, cached)


def outcome(seq: int, *ids: RequestId, finish: FinishCode = FinishCode.RUNNING) -> StepOutcome:
    return StepOutcome(seq, [*ids], [1] * len(ids), [finish] * len(ids))


def told(kept: Kept) -> list[tuple[str, int, int, int, str]]:
    """Name, steps, tokens and error of each span."""
    return [
        (
            each.name, each.attributes["lorax.first_step"], each.attributes["lorax.last_step"],
            each.attributes["lorax.tokens"], each.error,
        )
        for each in kept.spans
    ]  # type: ignore[misc] # fmt: skip


def test_a_row_is_computed_then_decoded_and_ends() -> None:
    kept = Kept()
    rows = RowSpans(kept, rank=0)
    rows.launched(
        StepPlan(1, row_ids=[ONE, OTHER], new_rows=[row(ONE, TRACE, cached=2), row(OTHER, None)])
    )
    rows.collected(outcome(1, OTHER))
    assert kept.spans == []
    rows.collected(outcome(2, ONE, OTHER))
    rows.collected(outcome(3, ONE))
    rows.collected(outcome(4, ONE, finish=FinishCode.EOS_TOKEN))
    # The router drops what has ended, which is no news.
    rows.launched(StepPlan(5, drop=[ONE]))
    assert told(kept) == [("shard prefill", 1, 2, 1, ""), ("shard decode", 2, 4, 3, "")]
    assert {each.parent for each in kept.spans} == {TRACE}
    assert {each.context.trace_id for each in kept.spans} == {TRACE.trace_id}
    assert {each.attributes["lorax.first_step_rows"] for each in kept.spans} == {2}
    assert all(each.start_ns <= each.end_ns for each in kept.spans)


def test_a_row_that_gives_way_and_comes_back_has_them_twice() -> None:
    kept = Kept()
    rows = RowSpans(kept, rank=0)
    rows.launched(StepPlan(1, row_ids=[ONE], new_rows=[row(ONE, TRACE)]))
    rows.collected(outcome(1, ONE))
    rows.launched(StepPlan(2, drop=[ONE]))
    rows.launched(StepPlan(3, row_ids=[ONE], new_rows=[row(ONE, TRACE, past=1)]))
    rows.collected(StepOutcome(3, failed=[ONE]))
    rows.launched(StepPlan(4, drop=[ONE], row_ids=[ONE], new_rows=[row(ONE, TRACE, past=1)]))
    rows.collected(outcome(4, ONE, finish=FinishCode.ERROR))
    assert told(kept) == [
        ("shard prefill", 1, 1, 3, ""), ("shard decode", 1, 2, 1, ""),
        ("shard prefill", 3, 3, 4, "pass_failed"),
        ("shard prefill", 4, 4, 4, ""), ("shard decode", 4, 4, 1, "generation"),
    ]  # fmt: skip


def test_rows_that_another_router_left_are_forgotten() -> None:
    kept = Kept()
    rows = RowSpans(kept, rank=0)
    rows.launched(StepPlan(1, row_ids=[ONE], new_rows=[row(ONE, TRACE)]))
    rows.forget()
    rows.collected(outcome(1, ONE))
    assert kept.spans == []
