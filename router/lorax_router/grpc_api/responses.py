"""From the service's values to messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf import timestamp_pb2

from lorax_contract.step import Alternatives, FinishCode, TokenColumns
from lorax_proto import lorax_pb2 as pb
from lorax_router.service import results
from lorax_router.service.adapters.listing import Document
from lorax_router.service.chat.answers import ChatAnswer
from lorax_router.service.chat.deltas import AssistantTurn
from lorax_router.service.info import ServerInfo
from lorax_router.service.prompts.tokenizer_pool import TokenSpan
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.text import TextStyle

FINISH_REASONS = {
    FinishCode.RUNNING: pb.FINISH_REASON_UNSPECIFIED,
    FinishCode.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishCode.EOS_TOKEN: pb.FINISH_REASON_EOS_TOKEN,
    FinishCode.STOP_SEQUENCE: pb.FINISH_REASON_STOP,
}


# What ended a text that is cut: a stop sequence or the id of a stop token.
StopCause = str | int | None


class AnswerStyle:
    """How a call wants its texts and tokens; the same for streams and whole answers."""

    def __init__(self, params: pb.Parameters, request: GenerateRequest) -> None:
        self.with_tokens = params.return_tokens or params.HasField("num_alternatives")
        is_said = params.HasField("skip_special_tokens")
        self.text = TextStyle(
            stops=tuple(request.parameters.stop),
            include_stop=params.include_stop,
            skip_special_tokens=params.skip_special_tokens if is_said else True,
        )

    def tokens(
        self, tokens: TokenColumns, alternatives: Sequence[Alternatives]
    ) -> Iterable[pb.Token]:
        """Return the tokens to show."""
        return _tokens(tokens, alternatives) if self.with_tokens else ()


def generate_response(
    result: results.GenerateResult, style: AnswerStyle, request_id: str
) -> pb.GenerateResponse:
    """Return the answer to Generate."""
    response = pb.GenerateResponse(request_id=request_id, **_common(result))
    for sequence in result.sequences:
        assembler = style.text.assembler()
        text = assembler.feed(sequence.chunk)
        response.sequences.add(text=text, **_ended(sequence, style, assembler.stopped_by))
    return response


def chat_response(
    result: results.GenerateResult, style: AnswerStyle, request_id: str
) -> pb.ChatResponse:
    """Return the answer to Chat."""
    response = pb.ChatResponse(request_id=request_id, **_common(result))
    for sequence in result.sequences:
        answer, turn = ChatAnswer.new(style.text, result.new_parser), AssistantTurn()
        turn.add(answer.deltas(sequence.chunk))
        message = pb.ChatMessage(
            role="assistant",
            content=turn.content,
            reasoning_content=turn.reasoning,
            tool_calls=(
                pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
                for call in turn.tool_calls
            ),
        )
        response.choices.add(message=message, **_ended(sequence, style, answer.stopped_by))
    return response


def tokenize_response(spans: Iterable[TokenSpan]) -> pb.TokenizeResponse:
    """Return the tokens of a text."""
    return pb.TokenizeResponse(tokens=(pb.TokenSpan(**each._asdict()) for each in spans))


def chat_tokens_response(ids: Iterable[int], strings: Iterable[str]) -> pb.TokenizeResponse:
    """Return the tokens of a chat, which have no places in anything that the client sent."""
    rows = zip(ids, strings, strict=True)
    return pb.TokenizeResponse(tokens=(pb.TokenSpan(id=each, text=text) for each, text in rows))


def info_response(info: ServerInfo) -> pb.InfoResponse:
    """Return what the server tells of itself."""
    return pb.InfoResponse(
        version=info.version,
        model_id=info.model_id,
        model_revision=info.model_sha or "",
        dtype=info.model_dtype,
        device_type=info.model_device_type,
        max_input_tokens=info.max_input_length,
        max_total_tokens=info.max_total_tokens,
        max_best_of=info.max_best_of,
        max_stop_sequences=info.max_stop_sequences,
        max_concurrent_requests=info.max_concurrent_requests,
        tasks=info.tasks,
        labels=info.labels or (),
    )


def adapter_info(document: Document) -> pb.AdapterInfo:
    """Return an adapter of a list."""
    info = pb.AdapterInfo(
        id=document["adapter_id"],
        source=document["adapter_source"],
        revision=document["revision"] or "",
        version=document["version"] or "",
        content_digest=document["content_digest"] or "",
        rank=document["rank"],
        state=document["state"],
        pinned=document["pinned"],
        bytes=pb.TierBytes(**document["bytes"]),
        waiting_requests=document["waiting"],
        running_requests=document["running"],
        uses=document["uses"],
        warnings=document["warnings"],
        alias_of=document["alias_of"] or "",
    )
    if document["last_used"] is not None:
        last_used = timestamp_pb2.Timestamp()
        last_used.FromMilliseconds(round(document["last_used"] * 1000))
        info.last_used.CopyFrom(last_used)
    if document["failure"] is not None:
        info.failure.CopyFrom(pb.AdapterFailure(**document["failure"]))
    return info


def _common(result: results.GenerateResult) -> dict[str, Any]:
    """What the answers of Generate and Chat have alike."""
    first = result.sequences[0]
    prompt = first.prompt_tokens
    return {
        "prompt_tokens": () if prompt is None else _tokens(prompt, first.prompt_alternatives),
        "usage": pb.Usage(
            prompt_tokens=result.num_prompt_tokens,
            generated_tokens=sum(each.num_generated for each in result.sequences),
            cached_tokens=result.num_cached_tokens,
        ),
        "timings": timings_of(result.timings, result.adapter),
    }


def _ended(sequence: results.Sequence, style: AnswerStyle, cause: StopCause) -> dict[str, Any]:
    """What is known at the end of a sequence."""
    return {
        "finish_reason": FINISH_REASONS[sequence.finish],
        "stopped_by": stopped_by(cause),
        "seed": sequence.seed,
        "tokens": style.tokens(sequence.tokens, sequence.alternatives),
    }


def stopped_by(cause: StopCause) -> pb.StoppedBy | None:
    """Return what ended a sequence; None: something else did."""
    match cause:
        case str() as text:
            return pb.StoppedBy(text=text)
        case int() as token_id:
            return pb.StoppedBy(token_id=token_id)
    return None


def timings_of(timings: results.Timings, adapter: results.AdapterUse | None) -> pb.Timings:
    """Return what a request took."""
    return pb.Timings(
        total_s=timings.total_s,
        validation_s=timings.validation_s,
        queue_s=timings.queue_s,
        inference_s=timings.inference_s,
        first_token_s=timings.first_token_s,
        adapter_s=None if adapter is None else adapter.phases,
    )


def _tokens(tokens: TokenColumns, alternatives: Sequence[Alternatives]) -> list[pb.Token]:
    rows = zip(tokens.ids, tokens.texts, tokens.logprobs, tokens.special, strict=True)
    made = [
        pb.Token(id=token_id, text=text, logprob=_known(logprob), special=special)
        for token_id, text, logprob, special in rows
    ]
    for token, each in zip(made, alternatives, strict=False):
        token.alternatives.extend(
            pb.Token(id=token_id, text=text, logprob=_known(logprob))
            for token_id, text, logprob in zip(each.ids, each.texts, each.logprobs, strict=True)
        )
    return made


def _known(logprob: float) -> float | None:
    """None: nothing came before the token, so that it has none."""
    return None if math.isnan(logprob) else logprob
