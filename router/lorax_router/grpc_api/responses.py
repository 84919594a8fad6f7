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
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.inference import GenerationStream, reported_seed
from lorax_router.service.info import ServerInfo
from lorax_router.service.prompts.tokenizer_pool import TokenSpan
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.text import TextAssembler

FINISH_REASONS = {
    FinishCode.RUNNING: pb.FINISH_REASON_UNSPECIFIED,
    FinishCode.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishCode.EOS_TOKEN: pb.FINISH_REASON_EOS_TOKEN,
    FinishCode.STOP_SEQUENCE: pb.FINISH_REASON_STOP,
}


class AnswerStyle:
    """How a call wants its texts and tokens; the same for streams and whole answers."""

    def __init__(self, params: pb.Parameters, request: GenerateRequest) -> None:
        self.with_tokens = params.return_tokens or params.HasField("num_alternatives")
        self._stops = tuple(request.parameters.stop)
        self._include_stop = params.include_stop
        is_said = params.HasField("skip_special_tokens")
        self._skip_special = params.skip_special_tokens if is_said else True

    def assembler(self) -> TextAssembler:
        """Return what makes the text of one sequence."""
        return TextAssembler(
            self._stops, include_stop=self._include_stop, skip_special_tokens=self._skip_special
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
        text, facts = _ended(sequence, style)
        response.sequences.add(text=text, **facts)
    return response


def chat_response(
    result: results.GenerateResult, style: AnswerStyle, request_id: str
) -> pb.ChatResponse:
    """Return the answer to Chat."""
    response = pb.ChatResponse(request_id=request_id, **_common(result))
    for sequence in result.sequences:
        text, facts = _ended(sequence, style)
        message = pb.ChatMessage(role="assistant", content=text)
        response.choices.add(message=message, **facts)
    return response


class ChunkMaker:
    """Makes the chunks of one stream, of Generate or of Chat.

    Args:
        make: the message's class.
        place, text: the names of its fields for the sequence and its text.
    """

    def __init__(
        self,
        make: type[pb.GenerateChunk | pb.ChatChunk],
        stream: GenerationStream,
        style: AnswerStyle,
        request_id: str,
    ) -> None:
        is_chat = make is pb.ChatChunk
        self._make: Any = make
        self._place, self._text = ("choice", "content") if is_chat else ("sequence", "text")
        self._stream = stream
        self._style = style
        self._assemblers = [style.assembler() for _ in stream.request.samplings]
        # Sent with the first one.
        self._request_id = request_id

    def chunk(self, sequence: int, chunk: TokenChunk) -> pb.GenerateChunk | pb.ChatChunk | None:
        """Return what a chunk says; None: nothing yet."""
        assembler = self._assemblers[sequence]
        text = assembler.feed(chunk)
        is_last = chunk.finish is not FinishCode.RUNNING
        if not (text or is_last or self._style.with_tokens):
            return None
        made = self._make(
            request_id=self._request_id,
            tokens=self._style.tokens(chunk.tokens, chunk.alternatives),
            finish_reason=FINISH_REASONS[chunk.finish],
            **{self._place: sequence, self._text: text},
        )
        self._request_id = ""
        if is_last:
            self._complete(made, sequence, assembler)
        return made  # type: ignore[no-any-return]

    def _complete(
        self, made: pb.GenerateChunk | pb.ChatChunk, sequence: int, assembler: TextAssembler
    ) -> None:
        """Add what the last chunk of a sequence has, and the last of all."""
        if (cause := _stopped_by(assembler)) is not None:
            made.stopped_by.CopyFrom(cause)
        stream = self._stream
        if (seed := reported_seed(stream.request.samplings[sequence])) is not None:
            made.seed = seed
        if stream.is_done:
            made.usage.prompt_tokens = stream.request.num_prompt_tokens
            made.usage.generated_tokens = stream.num_generated
            made.timings.CopyFrom(_timings(stream.timings, stream.adapter))


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
        ),
        "timings": _timings(result.timings, result.adapter),
    }


def _ended(sequence: results.Sequence, style: AnswerStyle) -> tuple[str, dict[str, Any]]:
    """The text of a sequence as a stream would have made it, and what is known at its end."""
    assembler = style.assembler()
    text = assembler.feed(TokenChunk(sequence.tokens, sequence.finish))
    return text, {
        "finish_reason": FINISH_REASONS[sequence.finish],
        "stopped_by": _stopped_by(assembler),
        "seed": sequence.seed,
        "tokens": style.tokens(sequence.tokens, sequence.alternatives),
    }


def _stopped_by(assembler: TextAssembler) -> pb.StoppedBy | None:
    match assembler.stopped_by:
        case str() as text:
            return pb.StoppedBy(text=text)
        case int() as token_id:
            return pb.StoppedBy(token_id=token_id)
    return None


def _timings(timings: results.Timings, adapter: results.AdapterUse | None) -> pb.Timings:
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
