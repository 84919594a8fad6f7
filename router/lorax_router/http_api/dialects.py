"""The routes of all dialects but those by which LoRAX generates."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from pydantic import BaseModel

from lorax_router.http_api.anthropic import api as anthropic
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.lorax.generate_routes import RootHandler
from lorax_router.http_api.model_routes import ModelRoutes
from lorax_router.http_api.openai import api as openai
from lorax_router.http_api.pooled.bodies import (
    ClassifyBatchBody,
    ClassifyBody,
    EmbedAllBody,
    EmbedBody,
    PredictBody,
    RerankBody,
    ScoreBody,
    SimilarityBody,
)
from lorax_router.http_api.pooled.classify_routes import ClassifyRoutes
from lorax_router.http_api.pooled.embed_routes import EmbedRoutes
from lorax_router.http_api.pooled.rank_routes import RankRoutes

# What they parse and stream, for the OpenAPI document.
BODIES: tuple[type[BaseModel], ...] = (
    EmbedBody, EmbedAllBody, ClassifyBody, ClassifyBatchBody, PredictBody, RerankBody, ScoreBody,
    SimilarityBody,
    *openai.BODIES, *anthropic.BODIES,
)  # fmt: skip
EVENTS: tuple[type[BaseModel], ...] = (*openai.EVENTS, *anthropic.EVENTS)


def dialect_routers(calls: Calls) -> Iterator[APIRouter]:
    """Yield the routers of all dialects, and of the models that they name."""
    yield ModelRoutes(calls.models).router()
    yield from generating_routers(calls)


def generating_routers(calls: Calls) -> Iterator[APIRouter]:
    """Yield the routers of all dialects whose every route generates, or counts tokens."""
    yield EmbedRoutes(calls).router()
    yield ClassifyRoutes(calls).router()
    ranks = RankRoutes(calls)
    yield ranks.router()
    yield ranks.versioned_router()
    yield from openai.openai_routers(calls)
    yield from anthropic.anthropic_routers(calls)


def root_handler(calls: Calls, task: str) -> RootHandler | None:
    """Return what answers TEI's clients at ``/`` where a model is for a task; None: it generates."""
    handlers: dict[str, RootHandler] = {
        "embed": EmbedRoutes(calls).embed_listed,
        "classify": ClassifyRoutes(calls).predict,
        "token-classify": ClassifyRoutes(calls).classify,
        "rerank": RankRoutes(calls).rerank,
    }
    return handlers.get(task)
