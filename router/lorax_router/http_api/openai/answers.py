"""What the answers of all of OpenAI's dialects have: ids, usage, reasons, logprobs."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import repeat

from lorax_contract.step import Alternatives, FinishCode, TokenColumns
from lorax_router.http_api.json_text import Json, finite

# What the answers were made by; seeds repeat theirs as long as it is the same.
_FINGERPRINT = f"lorax-py-{version('lorax-py')}"
FINISH_REASONS = {
    FinishCode.LENGTH: "length",
    FinishCode.EOS_TOKEN: "stop",
    FinishCode.STOP_SEQUENCE: "stop",
}


@dataclass(frozen=True, slots=True)
class Heading:
    """What every part of one answer begins with."""

    id: str
    kind: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def new(cls, prefix: str, kind: str, model: str) -> Heading:
        """Return the heading of a new answer, with an id of its own."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", kind, model)

    def document(self, choices: list[Json]) -> Json:
        """Return an answer, or a part of a streamed one."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": _FINGERPRINT,
            "choices": choices,
        }


def usage(
    num_prompt: int, num_cached: int, num_generated: int, num_reasoning: int | None = None
) -> Json:
    """Return what an answer took, in tokens."""
    document: Json = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }
    if num_reasoning is not None:
        document["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
    return document


def chat_logprobs(
    tokens: TokenColumns, alternatives: list[Alternatives], num_top: int
) -> list[Json]:
    """Return the logprobs of tokens as chats have them."""
    tops = alternatives or repeat(None, len(tokens.ids))
    return [
        {
            **_token(text, logprob),
            "top_logprobs": [] if top is None else [
                _token(each, value)
                for each, value in zip(top.texts[:num_top], top.logprobs[:num_top], strict=True)
            ],
        }
        for text, logprob, top in zip(tokens.texts, tokens.logprobs, tops, strict=True)
    ]  # fmt: skip


def _token(text: str, logprob: float) -> Json:
    raw = text.encode("utf-8", "replace")
    return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


@dataclass(slots=True)
class CompletionLogprobs:
    """The logprobs of a completion in columns, as its parts come."""

    # Where the next token begins in the text.
    offset: int = 0

    def document(
        self,
        tokens: TokenColumns,
        alternatives: list[Alternatives],
        *,
        first_is_given: bool = False,
    ) -> Json:
        """Return the columns of tokens; ``first_is_given``: nothing came before the first one."""
        offsets = []
        for text, special in zip(tokens.texts, tokens.special, strict=True):
            offsets.append(self.offset)
            self.offset += 0 if special else len(text)
        values: list[float | None] = [finite(each) for each in tokens.logprobs]
        tops: list[Json | None] = [
            _top(text, logprob, top)
            for text, logprob, top in zip(tokens.texts, tokens.logprobs, alternatives, strict=False)
        ]
        if first_is_given and values:
            values[0] = None
            tops[:1] = [None][: len(tops)]
        return {
            "tokens": tokens.texts,
            "token_logprobs": values,
            "top_logprobs": tops or None,
            "text_offset": offsets,
        }


def _top(text: str, logprob: float, top: Alternatives) -> Json:
    """The likeliest tokens by their texts, and the one that was taken."""
    found: Json = {}
    for each, value in zip(top.texts, top.logprobs, strict=True):
        # Of tokens with one text the likeliest.
        found.setdefault(each, finite(value))
    found.setdefault(text, finite(logprob))
    return found
