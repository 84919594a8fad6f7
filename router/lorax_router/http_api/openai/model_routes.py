"""The routes that tell which models requests can name."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ModelNotFoundError
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.json_body import bearer_token
from lorax_router.http_api.openai.errors import OpenAIRoute
from lorax_router.http_api.openai.schemas import ERRORS, ListModelsResponse, Model
from lorax_router.http_api.openapi import ANYWHERE
from lorax_router.http_api.responses import json_response
from lorax_router.service.models import ModelCard, Models


class ModelRoutes:
    """Handlers of ``/v1/models`` and what is below it."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["models"], route_class=OpenAIRoute)
        router.get(
            "/v1/models",
            summary="The base model, and the adapters that the caller may use",
            operation_id="list_models",
            responses={200: {"model": ListModelsResponse}, **ANYWHERE, 500: ERRORS[500]},
        )(self.list)
        router.get(
            "/v1/models/{model:path}",
            summary="What is known of a model",
            operation_id="retrieve_model",
            responses={
                200: {"model": Model},
                **ANYWHERE,
                404: ERRORS[404],
                500: ERRORS[500],
            },
            openapi_extra={
                "parameters": [
                    {
                        "name": "model",
                        "in": "path",
                        "required": True,
                        "description": "As requests name it; slashes need not be escaped.",
                        "schema": {"type": "string"},
                    }
                ]
            },
        )(self.retrieve)
        return router

    async def list(self, request: Request) -> Response:
        """Answer with all models."""
        cards = await self._models.cards(bearer_token(request), caller_of(request))
        return json_response({"object": "list", "data": [_document(card) for card in cards]})

    async def retrieve(self, request: Request) -> Response:
        """Answer with one model."""
        name = str(request.path_params["model"])
        if not name:
            raise ModelNotFoundError("the path must name a model")
        card = await self._models.card(name, bearer_token(request), caller_of(request))
        return json_response(_document(card))


def _document(card: ModelCard) -> dict[str, Any]:
    return {"object": "model", **asdict(card)}
