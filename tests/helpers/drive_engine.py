"""The router's scheduler and the shard's engine in one thread, without a wire between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from lorax_contract.step import (
    Alternatives,
    FinishCode,
    RequestId,
    RequestSpec,
    StepOutcome,
    TokenColumns,
)
from lorax_router.core.adapters.table import AdapterEvent
from lorax_router.core.scheduler import Scheduler
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.launched import LaunchedStep


@dataclass(slots=True)
class Answer:
    """What one request was given."""

    tokens: TokenColumns = field(default_factory=TokenColumns)
    alternatives: list[Alternatives] = field(default_factory=list)
    prompt_tokens: TokenColumns | None = None
    prompt_alternatives: list[Alternatives] = field(default_factory=list)
    text: str | None = None
    vector: bytes | None = None
    finish: FinishCode = FinishCode.RUNNING
    error: str | None = None

    def bits(self) -> str:
        """Return everything as text; equal texts mean equal bits (a NaN equals itself here)."""
        return repr(self)


def serve(
    engine: Engine,
    scheduler: Scheduler,
    requests: Iterable[RequestSpec],
    *,
    at_once: bool = False,
    cancelled: Collection[RequestId] = (),
) -> dict[RequestId, Answer]:
    """Run requests to their end; one arrives per turn, or all ``at_once``.

    Requests of ``cancelled`` are cancelled after two tokens. Steps are launched when
    they are planned and collected later: plans and launches between know nothing of their outcome.
    All adapters lie on the engine's lane already, so that orders are carried out at once.
    """
    waiting, flying = deque(requests), deque[LaunchedStep]()
    answers = {spec.request_id: Answer() for spec in waiting}
    now = 0.0
    while waiting or flying or not scheduler.is_idle:
        now += 1.0
        while waiting:
            scheduler.submit(waiting.popleft(), now)
            if not at_once:
                break
        while (plan := scheduler.plan(now)) is not None:
            flying.append(engine.launch(plan))
        _carry_out_orders(scheduler, now)
        if flying:
            outcome = engine.collect(flying.popleft())
            _book(outcome, scheduler.apply(outcome, now), answers)
        for request_id in cancelled:
            if len(answers[request_id].tokens.ids) == 2:
                scheduler.cancel(request_id)
        scheduler.check()
    return answers


def _carry_out_orders(scheduler: Scheduler, now: float) -> None:
    orders = scheduler.adapter_orders()
    for handle in orders.prepare:
        scheduler.adapter_event(handle, AdapterEvent.PREPARED, now, epoch=orders.epoch)
    for handle in orders.release:
        scheduler.adapter_event(handle, AdapterEvent.RELEASED, now, epoch=orders.epoch)


def _book(outcome: StepOutcome, accepted: list[bool], answers: dict[RequestId, Answer]) -> None:
    start, tokens = 0, outcome.tokens
    for request_id, count, finish, counts in zip(
        outcome.row_ids, outcome.num_tokens, outcome.finish, accepted, strict=True
    ):
        end = start + count
        if counts:
            answer, detail = answers[request_id], outcome.details.get(request_id)
            answer.tokens.ids += tokens.ids[start:end]
            answer.tokens.logprobs += tokens.logprobs[start:end]
            answer.tokens.texts += tokens.texts[start:end]
            answer.tokens.special += tokens.special[start:end]
            answer.finish = FinishCode(finish)
            if detail is not None:
                answer.alternatives += detail.alternatives
                if answer.prompt_tokens is None:
                    answer.prompt_tokens = detail.prompt_tokens
                    answer.prompt_alternatives = detail.prompt_alternatives
                answer.text, answer.error = detail.generated_text, detail.error_text
                answer.vector = detail.vector
        start = end
