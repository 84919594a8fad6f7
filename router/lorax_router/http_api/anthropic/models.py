"""Models as Anthropic's SDKs read them: one, and a page of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel

from lorax_contract.errors import ValidationError
from lorax_router.http_api.json_text import Json
from lorax_router.service.models import ModelCard

_DEFAULT_PAGE = 20
LARGEST_PAGE = 1000


class AnthropicModel(BaseModel):
    """A model that requests can name."""

    type: Literal["model"]
    id: str
    display_name: str
    # In RFC 3339.
    created_at: str
    lifecycle: Literal["active"]
    # Tokens of a prompt and its output.
    max_input_tokens: int
    max_tokens: int
    capabilities: None
    deprecated_at: None
    line: None
    retires_at: None


class AnthropicModelPage(BaseModel):
    """Some of the models; what comes after them is asked for by `last_id`."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


def anthropic_model(card: ModelCard) -> Json:
    """Return a model."""
    return {
        "type": "model",
        "id": card.id,
        "display_name": card.id,
        "created_at": datetime.fromtimestamp(card.created, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": card.max_model_len,
        "max_tokens": card.max_model_len,
        "capabilities": None,
        "deprecated_at": None,
        "line": None,
        "retires_at": None,
    }


def anthropic_page(cards: Sequence[ModelCard], query: Mapping[str, str]) -> Json:
    """Return the page that a query asks for; raises ValidationError."""
    limit, ids = _limit(query.get("limit", "")), [card.id for card in cards]
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise ValidationError("`after_id` and `before_id` exclude each other; send one")
    start, end = 0, len(ids)
    if after is not None:
        start = _place("after_id", after, ids) + 1
    if before is not None:
        end = _place("before_id", before, ids)
        start = max(0, end - limit)
    page = cards[start : min(start + limit, end)]
    has_more = start > 0 if before is not None else start + len(page) < len(ids)
    return {
        "data": [anthropic_model(card) for card in page],
        "has_more": has_more,
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
    }


def _limit(text: str) -> int:
    if not text:
        return _DEFAULT_PAGE
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if not 1 <= limit <= LARGEST_PAGE:
        raise ValidationError(f"`limit` must be a number from 1 to {LARGEST_PAGE}")
    return limit


def _place(name: str, wanted: str, ids: Sequence[str]) -> int:
    if wanted not in ids:
        raise ValidationError(f"`{name}` is not the `id` of a model that this caller may use")
    return ids.index(wanted)
