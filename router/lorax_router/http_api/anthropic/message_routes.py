"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_router.http_api.anthropic.answers import (
    MessageEvents,
    MessageHeading,
    message_document,
)
from lorax_router.http_api.anthropic.bodies import CountTokensBody, MessagesBody
from lorax_router.http_api.anthropic.contents import chat_prompt, tools_of_body
from lorax_router.http_api.anthropic.errors import AnthropicRoute
from lorax_router.http_api.anthropic.schemas import (
    ERRORS,
    AnthropicErrorResponse,
    AnthropicMessage,
    AnthropicStreamEvent,
    CountedTokens,
)
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.openapi import event_stream, json_body
from lorax_router.http_api.origins import origin_of
from lorax_router.http_api.responses import json_response, new_request_id
from lorax_router.service.requests import GenerateParameters, GenerateRequest
from lorax_router.service.text import TextStyle

_ANSWER = {
    "model": AnthropicMessage,
    "content": event_stream(AnthropicStreamEvent, AnthropicErrorResponse),
}


class MessageRoutes:
    """Handlers of ``/v1/messages`` and what is below it."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["anthropic"], route_class=AnthropicRoute)
        router.post(
            "/v1/messages",
            summary="Go on with a conversation",
            operation_id="create_message",
            responses={200: _ANSWER, **ERRORS},
            openapi_extra=json_body(MessagesBody),
        )(self.create)
        router.post(
            "/v1/messages/count_tokens",
            summary="Count the tokens of a conversation",
            operation_id="count_message_tokens",
            responses={200: {"model": CountedTokens}, **ERRORS},
            openapi_extra=json_body(CountTokensBody),
        )(self.count_tokens)
        return router

    async def create(self, request: Request) -> Response:
        """Answer with a message, or stream it."""
        body = await self._calls.read(request, MessagesBody)
        with self._calls.becoming_one(request):
            wanted = _wanted(request, body, self._calls.named(request, body, body.parameters()))
        style = TextStyle(stops=body.stops)
        heading = MessageHeading(self._calls.models.shown(body.model))
        headers = {"request-id": heading.request_id}
        if body.stream:
            return self._calls.stream(body, [wanted], MessageEvents(heading, style), headers)
        try:
            (result,) = await self._calls.generate(request, body, [wanted])
        except ClientGoneError:
            return Response()
        return json_response(message_document(heading, style, result), headers=headers)

    async def count_tokens(self, request: Request) -> Response:
        """Answer with the number of tokens of a prompt."""
        body = await self._calls.read(request, CountTokensBody)
        wanted = _wanted(request, body, self._calls.named(request, body, GenerateParameters()))
        try:
            number = await self._calls.count_tokens(request, body, wanted)
        except ClientGoneError:
            return Response()
        return json_response({"input_tokens": number}, headers={"request-id": new_request_id()})


def _wanted(
    request: Request, body: MessagesBody | CountTokensBody, parameters: GenerateParameters
) -> GenerateRequest:
    return GenerateRequest(
        prompt=chat_prompt(body, tools_of_body(body)),
        parameters=parameters,
        caller=caller_of(request),
        origin=origin_of(request),
    )
