"""The line that each request has in the log: what it was, how it ended, where its time went."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lorax_contract.errors import CapacityError, DeadlineError, LoraxError, RequestError
from lorax_router.service.accounts.summary import RequestSummary
from lorax_router.service.requests import BASE_MODEL_ADAPTER_ID

logger = logging.getLogger("lorax_router.request")

# What is no fault of the server's, and may come often.
_EXPECTED = (RequestError, CapacityError, DeadlineError, asyncio.CancelledError)


def write_line(summary: RequestSummary, num_requests: int = 1) -> None:
    """Write the line of a request, or of as many that were refused alike."""
    error = summary.error
    is_fault = not (error is None or isinstance(error, _EXPECTED))
    level = logging.WARNING if is_fault else logging.INFO
    if logger.isEnabledFor(level):
        fields = line_of(summary)
        if num_requests != 1:
            fields["requests"] = num_requests
        logger.log(level, "request ended: %s", summary.outcome, extra={"fields": fields})


def write_shared_line(summaries: Sequence[RequestSummary]) -> None:
    """Write the one line of requests of a call that were answered at the same time."""
    if logger.isEnabledFor(logging.INFO):
        last = summaries[-1]
        fields = line_of(last) if len(summaries) == 1 else shared_line_of(summaries)
        logger.info("request ended: %s", last.outcome, extra={"fields": fields})


def shared_line_of(summaries: Sequence[RequestSummary]) -> dict[str, Any]:
    """Return the fields of several requests' line: counts are of all of them, times of the last."""
    fields = line_of(summaries[-1])
    valid = [each.valid for each in summaries if each.valid is not None]
    fields["prompt_tokens"] = sum(each.num_prompt_tokens for each in valid)
    fields["sequences"] = sum(each.num_sequences for each in valid)
    fields |= _counts(summaries)
    used = [each.adapter for each in summaries]
    labels = dict.fromkeys(BASE_MODEL_ADAPTER_ID if each is None else each.label for each in used)
    if len(labels) > 1:
        fields.pop("adapter", None)
        fields["adapters"] = [*labels]
    return fields | {"requests": len(summaries)}


def line_of(summary: RequestSummary) -> dict[str, Any]:
    """Return the fields of a request's line: lengths, times and names; no prompt and no token."""
    fields: dict[str, Any] = {"event": "request", "outcome": summary.outcome}
    fields["status"], fields["stream"] = summary.status, summary.is_stream
    fields |= _caller(summary)
    if (valid := summary.valid) is not None:
        fields["prompt_tokens"] = valid.num_prompt_tokens
        fields["max_new_tokens"] = valid.stopping.max_new_tokens
        fields["sequences"] = len(valid.samplings)
    fields |= _adapter(summary)
    fields |= _counts([summary])
    if summary.error is None:
        fields["finish_reason"] = summary.finish_reason
    fields |= _times(summary)
    if isinstance(summary.error, LoraxError) and not summary.is_refused:
        fields["error"] = str(summary.error)
    return fields


def _caller(summary: RequestSummary) -> dict[str, Any]:
    origin, trace = summary.origin, summary.trace
    fields = {
        "protocol": origin.protocol,
        "call": origin.call,
        "request_id": origin.request_id,
        "trace_id": "" if trace is None else trace.trace_id,
        "tenant": summary.caller.tenant,
    }
    said: dict[str, Any] = {name: value for name, value in fields.items() if value}
    if summary.caller.has_key:
        said["priority"] = summary.caller.priority
    return said


def _adapter(summary: RequestSummary) -> dict[str, Any]:
    if (adapter := summary.adapter) is None:
        return {}
    phases = {f"adapter_{name}_ms": _ms(seconds) for name, seconds in adapter.phases.items()}
    return {"adapter": adapter.label, **phases}


def _counts(summaries: Sequence[RequestSummary]) -> dict[str, int]:
    """Return the counts of all sequences of requests."""
    costs = [cost for each in summaries for cost in each.costs]
    counts = {
        "cached_tokens": sum([each.num_cached for each in summaries]),
        "drafted_tokens": sum([each.num_drafted for each in costs]),
        "accepted_tokens": sum([each.num_accepted for each in summaries]),
        "preemptions": sum([each.num_returns for each in costs]),
        "restarts": sum([len(each.cost.recoveries) for each in summaries]),
    }
    told = {"generated_tokens": sum([each.num_generated for each in summaries])}
    return told | {name: count for name, count in counts.items() if count}


def _times(summary: RequestSummary) -> dict[str, float]:
    """Return the milliseconds of each phase that it came to, and of all."""
    took: defaultdict[str, float] = defaultdict(float)
    for phase in summary.phases():
        # An adapter is fetched, and loaded: one cost.
        took[phase.name.partition("_")[0]] += phase.seconds
    if summary.timings is not None and summary.timings.first_token_s:
        took["first_token"] = summary.timings.first_token_s
    took["total"] = summary.ended_at - summary.received_at
    return {f"{name}_ms": _ms(seconds) for name, seconds in took.items()}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
