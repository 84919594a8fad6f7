"""Results as JSON bytes, in LoRAX's shapes.

Streamed tokens are the hot path: plain dicts and orjson, no model per token. A
logprob is never null, since clients refuse that; what JSON cannot say becomes the
lowest 32-bit number.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

import orjson

from lorax_contract.errors import LoraxError
from lorax_contract.step import Alternatives, TokenColumns
from lorax_router.service.engine.port import TokenChunk
from lorax_router.service.inference import GenerationStream
from lorax_router.service.prompts.tokenizer_pool import TokenSpan
from lorax_router.service.results import FINISH_REASONS, GenerateResult, Sequence

_LOWEST_LOGPROB = -3.4028234663852886e38
_SPANS_AT_ONCE = 1_000

Json = dict[str, Any]


def dumps(document: object) -> bytes:
    """Return compact JSON; text that is not valid Unicode is repaired, never fatal."""
    try:
        return orjson.dumps(document)
    except TypeError:
        return orjson.dumps(_repaired(document))


def error_document(error: LoraxError) -> Json:
    """The body of an error."""
    return {"error": error.public, "error_type": error.kind.error_type}


def event(document: object) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(document) + b"\n\n"


def chunk_events(chunk: TokenChunk) -> bytes:
    """The events of the tokens of a chunk, apart from what the last token of all carries."""
    return b"".join(
        [
            event({"token": token, "generated_text": None, "details": None})
            for token in token_documents(chunk.tokens, chunk.alternatives)
        ]
    )


def last_chunk_events(chunk: TokenChunk, stream: GenerationStream) -> bytes:
    """The events of the last chunk; its last token carries the text and the details."""
    request = stream.request
    *tokens, last = token_documents(chunk.tokens, chunk.alternatives)
    events = [event({"token": each, "generated_text": None, "details": None}) for each in tokens]
    details = None
    if request.details:
        details = {
            "finish_reason": FINISH_REASONS[chunk.finish],
            "prompt_tokens": request.num_prompt_tokens,
            "generated_tokens": stream.num_generated,
            "skipped_tokens": 0,
            "seed": stream.seed,
        }
    text = request.full_text(chunk.generated_text or "")
    events.append(event({"token": last, "generated_text": text, "details": details}))
    return b"".join(events)


def token_documents(tokens: TokenColumns, alternatives: list[Alternatives]) -> list[Json]:
    """The tokens of a sequence or a chunk, each with its alternatives if there are any."""
    documents: list[Json] = [
        {
            "id": token_id,
            "text": text,
            "logprob": logprob if isfinite(logprob) else _LOWEST_LOGPROB,
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


def spans_json(spans: list[TokenSpan]) -> bytes:
    """The answer to a text to tokenize, written in slices so that other threads get their turn."""
    slices = (
        spans[start : start + _SPANS_AT_ONCE] for start in range(0, len(spans), _SPANS_AT_ONCE)
    )
    parts = [
        dumps([{"id": s.id, "text": s.text, "start": s.start, "stop": s.stop} for s in each])[1:-1]
        for each in slices
    ]
    return b"[" + b",".join(parts) + b"]"


def result_document(result: GenerateResult) -> Json:
    """The answer to a request that was not streamed."""
    document: Json = {"generated_text": result.texts[0]}
    if not result.details:
        return document
    best, *others = result.sequences
    details = _sequence_details(best)
    details["prompt_tokens"] = result.num_prompt_tokens
    details["skipped_tokens"] = 0
    if others:
        details["best_of_sequences"] = [
            {"generated_text": text, **_sequence_details(each)}
            for text, each in zip(result.texts[1:], others, strict=True)
        ]
    document["details"] = details
    return document


def finite(logprob: float) -> float:
    """A logprob that JSON can say."""
    return logprob if isfinite(logprob) else _LOWEST_LOGPROB


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


def _repaired(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _repaired(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_repaired(each) for each in value]
    return value
