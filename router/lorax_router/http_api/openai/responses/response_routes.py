"""``/v1/responses``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.openai.errors import OpenAIRoute
from lorax_router.http_api.openai.responses.answers import (
    NAMES,
    ResponseEvents,
    ResponseHeading,
    response_document,
)
from lorax_router.http_api.openai.responses.bodies import ResponsesBody
from lorax_router.http_api.openai.responses.items import function_tools, input_prompt
from lorax_router.http_api.openai.responses.schemas import ResponseObject, ResponseStreamEvent
from lorax_router.http_api.openai.schemas import ERRORS, OpenAIErrorResponse
from lorax_router.http_api.openapi import event_stream, json_body
from lorax_router.http_api.origins import origin_of
from lorax_router.http_api.responses import json_response
from lorax_router.service.requests import GenerateRequest

_ANSWER = {
    "model": ResponseObject,
    "content": event_stream(ResponseStreamEvent, OpenAIErrorResponse),
}


class _ResponseRoute(OpenAIRoute):
    names: ClassVar[Mapping[str, str]] = NAMES


class ResponseRoutes:
    """The handler of ``/v1/responses``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The route with its documentation."""
        router = APIRouter(tags=["openai"], route_class=_ResponseRoute)
        router.post(
            "/v1/responses",
            summary="Answer an input; nothing is kept",
            operation_id="create_response",
            responses={200: _ANSWER, **ERRORS},
            openapi_extra=json_body(ResponsesBody),
        )(self.create)
        return router

    async def create(self, request: Request) -> Response:
        """Answer with a response, or stream it."""
        body = await self._calls.read(request, ResponsesBody)
        with self._calls.becoming_one(request):
            wanted = GenerateRequest(
                prompt=input_prompt(body, function_tools(body)),
                parameters=self._calls.named(request, body, body.parameters()),
                caller=caller_of(request),
                origin=origin_of(request),
            )
        heading = ResponseHeading(body, self._calls.models.shown(body.model))
        if body.stream:
            return self._calls.stream(body, [wanted], ResponseEvents(heading))
        try:
            (result,) = await self._calls.generate(request, body, [wanted])
        except ClientGoneError:
            return Response()
        return json_response(response_document(heading, result))
