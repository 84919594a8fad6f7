"""The routes that tell which models requests can name, to OpenAI's SDKs and to Anthropic's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import LoraxError, ModelNotFoundError
from lorax_router.http_api.anthropic.errors import anthropic_error_response
from lorax_router.http_api.anthropic.models import (
    LARGEST_PAGE,
    AnthropicModel,
    AnthropicModelPage,
    anthropic_model,
    anthropic_page,
)
from lorax_router.http_api.anthropic.schemas import AnthropicErrorResponse
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.json_body import bearer_token
from lorax_router.http_api.json_text import Json
from lorax_router.http_api.openai.errors import OpenAIRoute
from lorax_router.http_api.openai.schemas import ListModelsResponse, Model, OpenAIErrorResponse
from lorax_router.http_api.openapi import ANYWHERE, Responses
from lorax_router.http_api.refusals import ANTHROPIC_VERSION, speaks_anthropic
from lorax_router.http_api.responses import json_response, new_request_id
from lorax_router.service.models import ModelCard, Models


def _errors(texts: dict[int, str]) -> Responses:
    model = OpenAIErrorResponse | AnthropicErrorResponse
    return {status: {"model": model, "description": text} for status, text in texts.items()}


def _parameter(place: str, name: str, text: str, **schema: Any) -> Json:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": text,
        "schema": {"type": "string", **schema},
    }


_ERRORS = {**ANYWHERE, **_errors({500: "An unexpected error"})}
_VERSION = _parameter(
    "header", ANTHROPIC_VERSION, "With any value: the answer is as Anthropic's SDKs read it."
)
_PAGE = [
    _parameter("query", name, f"With {ANTHROPIC_VERSION}: {text}", **schema)
    for name, text, schema in (
        ("limit", "most models on the page.",
         {"type": "integer", "minimum": 1, "maximum": LARGEST_PAGE}),
        ("after_id", "the model before the page.", {}),
        ("before_id", "the model behind the page.", {}),
    )
]  # fmt: skip


class _ModelRoute(OpenAIRoute):
    """A route whose errors are of the dialect in which it was asked."""

    def response_of(self, error: LoraxError, request: Request) -> Response:
        """Return the response of an error that the handler of a request raised."""
        if speaks_anthropic(request.scope):
            return anthropic_error_response(error)
        return super().response_of(error, request)


class ModelRoutes:
    """Handlers of ``/v1/models`` and what is below it."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["models"], route_class=_ModelRoute)
        router.get(
            "/v1/models",
            summary="The base model, and the adapters that the caller may use",
            operation_id="list_models",
            responses={
                200: {"model": ListModelsResponse | AnthropicModelPage},
                **_ERRORS,
                **_errors({400: "The page is none"}),
            },
            openapi_extra={"parameters": [_VERSION, *_PAGE]},
        )(self.list)
        path = _parameter("path", "model", "As requests name it; slashes need not be escaped.")
        router.get(
            "/v1/models/{model:path}",
            summary="What is known of a model",
            operation_id="retrieve_model",
            responses={
                200: {"model": Model | AnthropicModel},
                **_ERRORS,
                **_errors({404: "There is no such model"}),
            },
            openapi_extra={"parameters": [path, _VERSION]},
        )(self.retrieve)
        return router

    async def list(self, request: Request) -> Response:
        """Answer with all models, or with a page of them."""
        cards = await self._models.cards(bearer_token(request), caller_of(request))
        if speaks_anthropic(request.scope):
            return _for_anthropic(anthropic_page(cards, request.query_params))
        return json_response({"object": "list", "data": [_document(card) for card in cards]})

    async def retrieve(self, request: Request) -> Response:
        """Answer with one model."""
        name = str(request.path_params["model"])
        if not name:
            raise ModelNotFoundError("the path must name a model")
        card = await self._models.card(name, bearer_token(request), caller_of(request))
        if speaks_anthropic(request.scope):
            return _for_anthropic(anthropic_model(card))
        return json_response(_document(card))


def _document(card: ModelCard) -> Json:
    return {"object": "model", **asdict(card)}


def _for_anthropic(document: Json) -> Response:
    return json_response(document, headers={"request-id": new_request_id()})
