"""All routes of OpenAI's dialect, put together."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from pydantic import BaseModel

from lorax_router.http_api.calls import Calls
from lorax_router.http_api.openai.bodies import ChatBody, CompletionBody, EmbeddingBody
from lorax_router.http_api.openai.chat_routes import ChatRoutes
from lorax_router.http_api.openai.completion_routes import CompletionRoutes
from lorax_router.http_api.openai.embedding_routes import EmbeddingRoutes
from lorax_router.http_api.openai.responses.bodies import ResponsesBody
from lorax_router.http_api.openai.responses.response_routes import ResponseRoutes
from lorax_router.http_api.openai.responses.schemas import ResponseStreamEvent
from lorax_router.http_api.openai.schemas import ChatCompletionChunk, Completion

# What the routes parse, for the OpenAPI document.
BODIES: tuple[type[BaseModel], ...] = (
    ChatBody, CompletionBody, ResponsesBody, EmbeddingBody,
)  # fmt: skip
EVENTS: tuple[type[BaseModel], ...] = (ChatCompletionChunk, Completion, ResponseStreamEvent)


def openai_routers(calls: Calls) -> Iterator[APIRouter]:
    """Yield the routers of completions, chats, responses and embeddings."""
    yield CompletionRoutes(calls).router()
    yield ChatRoutes(calls).router()
    yield ResponseRoutes(calls).router()
    embeddings = EmbeddingRoutes(calls)
    yield embeddings.router()
    yield embeddings.unversioned_router()
