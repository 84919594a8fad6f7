"""The spans of a request: made at its end, of the moments that its line in the log has."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from time import perf_counter

from lorax_contract.trace_ids import child_of
from lorax_contract.tracing import AttributeValue, FinishedSpan
from lorax_router.service.accounts.summary import RequestSummary

_Attributes = dict[str, AttributeValue]


def spans_of(summary: RequestSummary, model: str) -> Iterator[FinishedSpan]:
    """Yield the span of a traced request, then those of what its time went into.

    ``model`` is the base's name. Attributes are by OpenTelemetry's names for generative models
    where it has some; there is no prompt, no output and no secret among them.
    """
    context = summary.trace
    assert context is not None
    clock = _UnixClock()
    yield FinishedSpan(
        name=f"generate {model}",
        context=context,
        parent=summary.trace_parent,
        start_ns=clock.ns(summary.received_at),
        end_ns=clock.ns(summary.ended_at),
        is_server=True,
        attributes=_attributes(summary, model),
        error="" if summary.error is None else summary.outcome,
    )
    for phase in summary.phases():
        yield FinishedSpan(
            name=phase.name,
            context=child_of(context),
            parent=context,
            start_ns=clock.ns(phase.start),
            end_ns=clock.ns(phase.end),
        )


class _UnixClock:
    """Tells moments of perf_counter as nanoseconds since 1970, as the clock is set now."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - round(perf_counter() * 1e9)

    def ns(self, moment: float) -> int:
        return self._offset_ns + round(moment * 1e9)


def _attributes(summary: RequestSummary, model: str) -> _Attributes:
    adapter, origin = summary.adapter, summary.origin
    found: _Attributes = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "lorax",
        "gen_ai.request.model": model if adapter is None else adapter.label,
        "gen_ai.response.model": model,
        "gen_ai.usage.output_tokens": summary.num_generated,
        "gen_ai.request.stream": summary.is_stream,
        "lorax.outcome": summary.outcome,
        "lorax.status": summary.status,
    }
    said = {
        "lorax.protocol": origin.protocol,
        "lorax.call": origin.call,
        "lorax.request_id": origin.request_id,
        "lorax.tenant": summary.caller.tenant,
        "lorax.adapter": "" if adapter is None else adapter.label,
        "error.type": "" if summary.error is None else summary.outcome,
    }
    found |= {name: value for name, value in said.items() if value}
    return found | _of_prompt(summary) | _of_rows(summary)


def _of_prompt(summary: RequestSummary) -> _Attributes:
    """Return what is known of a request that was valid."""
    if (valid := summary.valid) is None:
        return {}
    sampling = valid.samplings[0]
    found: _Attributes = {
        # A chat's prompt is what a template made of it.
        "gen_ai.operation.name": "chat" if valid.prompt_text else "text_completion",
        "gen_ai.usage.input_tokens": valid.num_prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": summary.num_cached,
        "gen_ai.request.max_tokens": valid.stopping.max_new_tokens,
        "gen_ai.request.choice.count": len(valid.samplings),
    }
    if sampling.do_sample:
        found |= {
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.request.seed": sampling.seed,
        }
    if summary.finish_reason is not None:
        found["gen_ai.response.finish_reasons"] = (summary.finish_reason,)
    return found


def _of_rows(summary: RequestSummary) -> _Attributes:
    """Return what the sequences took that few do."""
    costs = summary.costs
    counts: Mapping[str, int] = {
        "lorax.drafted_tokens": sum(each.num_drafted for each in costs),
        "lorax.accepted_tokens": summary.num_accepted,
        "lorax.preemptions": sum(each.num_returns for each in costs),
        "lorax.restarts": len(summary.cost.recoveries),
    }
    return {name: count for name, count in counts.items() if count}
