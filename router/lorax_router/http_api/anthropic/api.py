"""All routes of Anthropic's dialect, put together."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter
from pydantic import BaseModel

from lorax_router.http_api.anthropic.bodies import CountTokensBody, MessagesBody
from lorax_router.http_api.anthropic.message_routes import MessageRoutes
from lorax_router.http_api.anthropic.schemas import AnthropicStreamEvent
from lorax_router.http_api.calls import Calls

# What the routes parse and stream, for the OpenAPI document.
BODIES: tuple[type[BaseModel], ...] = (MessagesBody, CountTokensBody)
EVENTS: tuple[type[BaseModel], ...] = (AnthropicStreamEvent,)


def anthropic_routers(calls: Calls) -> Iterator[APIRouter]:
    """Yield the router of messages."""
    yield MessageRoutes(calls).router()
