"""Results as JSON bytes, in LoRAX's shapes.

Streamed tokens are the hot path: plain dicts and orjson, no model per token. A
logprob is never null, since clients refuse that; what JSON cannot say becomes the
lowest 32-bit number.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_contract.step import Alternatives, FinishCode, TokenColumns
from lorax_router.http_api.json_text import Json, dumps, event, finite
from lorax_router.http_api.responses import error_document, error_response
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.generation import AnswerStream
from lorax_router.service.prompts.tokenizer_pool import TokenSpan
from lorax_router.service.results import FINISH_REASONS, GenerateResult, Sequence

_SPANS_AT_ONCE = 1_000


class LoraxEvents:
    """LoRAX's events, one for each token; an EventWriter for one sequence."""

    def begin(self, stream: AnswerStream) -> bytes:
        """Take the stream; nothing comes before the first token."""
        self._stream = stream
        return b""

    def chunk(self, _sequence: int, chunk: TokenChunk) -> bytes:
        """Return an event for each token; that of the very last carries text and details."""
        tokens = token_documents(chunk.tokens, chunk.alternatives)
        documents: list[Json] = [
            {"token": token, "generated_text": None, "details": None} for token in tokens
        ]
        if len(documents) == 1 and chunk.finish is FinishCode.RUNNING:
            return event(documents[0])
        if chunk.finish is not FinishCode.RUNNING:
            documents[-1] |= self._ending(chunk)
        return b"".join(map(event, documents))

    def end(self) -> bytes:
        """Return nothing: the last token was the end."""
        return b""

    def failure(self, error: LoraxError) -> bytes:
        """Return an error as an event."""
        return event(error_document(error))

    def refusal(self, error: LoraxError) -> Response:
        """Return the response of an error."""
        return error_response(error)

    def _ending(self, chunk: TokenChunk) -> Json:
        stream = self._stream
        request, details = stream.request, None
        if request.details:
            details = {
                "finish_reason": FINISH_REASONS[chunk.finish],
                "prompt_tokens": request.num_prompt_tokens,
                "generated_tokens": stream.num_generated,
                "skipped_tokens": stream.num_skipped,
                "seed": stream.seed,
            }
        text = request.full_text(chunk.generated_text or "")
        return {"generated_text": text, "details": details}


def token_documents(tokens: TokenColumns, alternatives: list[Alternatives]) -> list[Json]:
    """The tokens of a sequence or a chunk, each with its alternatives if there are any."""
    documents: list[Json] = [
        {
            "id": token_id,
            "text": text,
            "logprob": finite(logprob),
            "special": special,
            "skipped": False,
        }
        for token_id, text, logprob, special in zip(
            tokens.ids, tokens.texts, tokens.logprobs, tokens.special, strict=True
        )
    ]
    for document, each in zip(documents, alternatives, strict=False):
        document["alternative_tokens"] = [
            {"id": token_id, "text": text, "logprob": finite(logprob)}
            for token_id, text, logprob in zip(each.ids, each.texts, each.logprobs, strict=True)
        ]
    return documents


def spans_json(spans: list[TokenSpan], special: Mapping[int, str] | None = None) -> bytes:
    """The answer to a text to tokenize, written in slices so that other threads get their turn.

    With ``special`` tokens, by id, it says of each whether it is one; those have no place in the text.
    """
    slices = (
        spans[start : start + _SPANS_AT_ONCE] for start in range(0, len(spans), _SPANS_AT_ONCE)
    )
    parts = [dumps([_span_document(span, special) for span in each])[1:-1] for each in slices]
    return b"[" + b",".join(parts) + b"]"


def _span_document(span: TokenSpan, special: Mapping[int, str] | None) -> Json:
    document = span._asdict()
    if special is None:
        return document
    if span.id in special:
        return {
            "id": span.id,
            "text": special[span.id],
            "special": True,
            "start": None,
            "stop": None,
        }
    return {**document, "special": False}


def result_document(result: GenerateResult) -> Json:
    """The answer to a request that was not streamed."""
    document: Json = {"generated_text": result.texts[0]}
    if not result.details:
        return document
    best, *others = result.sequences
    details = _sequence_details(best)
    details["prompt_tokens"] = result.num_prompt_tokens
    details["skipped_tokens"] = result.num_skipped_tokens
    if others:
        details["best_of_sequences"] = [
            {"generated_text": text, **_sequence_details(each)}
            for text, each in zip(result.texts[1:], others, strict=True)
        ]
    document["details"] = details
    return document


def _sequence_details(sequence: Sequence) -> Json:
    return {
        "finish_reason": sequence.finish_reason,
        "generated_tokens": sequence.num_generated,
        "seed": sequence.seed,
        "prefill": _prefill(sequence.prompt_tokens),
        "tokens": token_documents(sequence.tokens, sequence.alternatives),
    }


def _prefill(tokens: TokenColumns | None) -> list[Json]:
    """The tokens of the prompt; nothing precedes the first one, so it has no logprob."""
    if tokens is None:
        return []
    rows = zip(tokens.ids, tokens.texts, tokens.logprobs, strict=True)
    return [
        {"id": token_id, "text": text, "logprob": finite(logprob) if place else None}
        for place, (token_id, text, logprob) in enumerate(rows)
    ]
