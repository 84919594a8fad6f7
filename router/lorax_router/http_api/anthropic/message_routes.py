"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from functools import partial

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
from lorax_router.http_api.anthropic.errors import AnthropicRoute, new_request_id
from lorax_router.http_api.anthropic.schemas import (
    ERRORS,
    AnthropicErrorResponse,
    AnthropicMessage,
    AnthropicStreamEvent,
    CountedTokens,
)
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.chat_parts import ChatShape, OfferedTools, bound_by
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.openapi import event_stream, json_body
from lorax_router.http_api.responses import json_response
from lorax_router.service.chat.outputs import OutputParsers
from lorax_router.service.requests import GenerateParameters, GenerateRequest

_ANSWER = {
    "model": AnthropicMessage,
    "content": event_stream(AnthropicStreamEvent, AnthropicErrorResponse),
}


class MessageRoutes:
    """Handlers of ``/v1/messages`` and what is below it."""

    def __init__(self, calls: Calls, outputs: OutputParsers) -> None:
        self._calls = calls
        self._outputs = outputs

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
        tools = tools_of_body(body)
        prompt, shape = chat_prompt(body, tools), self._shape(body, tools)
        own = await bound_by(self._outputs, tools, prompt, body.parameters())
        wanted = GenerateRequest(
            prompt=prompt,
            parameters=self._calls.named(request, body, own),
            caller=caller_of(request),
        )
        heading = MessageHeading(self._calls.models.shown(body.model))
        headers = {"request-id": heading.request_id}
        if body.stream:
            return self._calls.stream(body, [wanted], MessageEvents(heading, shape), headers)
        try:
            (result,) = await self._calls.generate(request, body, [wanted])
        except ClientGoneError:
            return Response()
        return json_response(message_document(heading, shape, result), headers=headers)

    async def count_tokens(self, request: Request) -> Response:
        """Answer with the number of tokens of a prompt."""
        body = await self._calls.read(request, CountTokensBody)
        wanted = GenerateRequest(
            prompt=chat_prompt(body, tools_of_body(body)),
            parameters=self._calls.named(request, body, GenerateParameters()),
            caller=caller_of(request),
        )
        try:
            number = await self._calls.count_tokens(request, body, wanted)
        except ClientGoneError:
            return Response()
        return json_response({"input_tokens": number}, headers={"request-id": new_request_id()})

    def _shape(self, body: MessagesBody, tools: OfferedTools) -> ChatShape:
        return ChatShape(
            new_parser=partial(self._outputs.new, tools.functions, tools.choice),
            stops=body.stops,
            is_single_call=tools.is_single,
        )
