"""``/v1/chat/completions``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.openai.answers import Heading
from lorax_router.http_api.openai.bodies import ChatBody
from lorax_router.http_api.openai.chats import ChatEvents, ChatShape, chat_document
from lorax_router.http_api.openai.errors import (
    CHAT_FIELDS,
    NEWER_CHAT_FIELDS,
    OpenAIRoute,
    openai_error_response,
)
from lorax_router.http_api.openai.messages import checked_messages
from lorax_router.http_api.openai.schemas import (
    ERRORS,
    ChatCompletion,
    ChatCompletionChunk,
    OpenAIErrorResponse,
)
from lorax_router.http_api.openai.tool_choice import offered_tools
from lorax_router.http_api.openapi import event_stream, json_body
from lorax_router.http_api.origins import origin_of
from lorax_router.http_api.responses import json_response
from lorax_router.service.chat.offers import OfferedTools
from lorax_router.service.requests import ChatPrompt, GenerateRequest

# Where a request keeps what its client calls the fields.
_NAMES = "field_names"
_ANSWER = {
    "model": ChatCompletion,
    "content": event_stream(ChatCompletionChunk, OpenAIErrorResponse),
}


class ChatRoute(OpenAIRoute):
    """A route whose prompt is messages."""

    def response_of(self, error: LoraxError, request: Request) -> Response:
        """Return the response of an error that the handler of a request raised."""
        return openai_error_response(error, getattr(request.state, _NAMES, CHAT_FIELDS))


class ChatRoutes:
    """The handler of ``/v1/chat/completions``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The route with its documentation."""
        router = APIRouter(tags=["openai"], route_class=ChatRoute)
        router.post(
            "/v1/chat/completions",
            summary="Go on with a conversation",
            operation_id="create_chat_completion",
            responses={200: _ANSWER, **ERRORS},
            openapi_extra=json_body(ChatBody),
        )(self.create)
        return router

    async def create(self, request: Request) -> Response:
        """Answer with all choices, or stream them."""
        body = await self._calls.read(request, ChatBody)
        names = CHAT_FIELDS if body.max_completion_tokens is None else NEWER_CHAT_FIELDS
        setattr(request.state, _NAMES, names)
        with self._calls.becoming_one(request):
            tools = offered_tools(
                [each.model_dump(exclude_none=True) for each in body.tools or []],
                body.tool_choice,
                is_single=body.parallel_tool_calls is False,
            )
            shape, wanted = _shape(body), self._wanted(request, body, tools)
        model = self._calls.models.shown(body.model)
        if body.stream:
            heading = Heading.new("chatcmpl", "chat.completion.chunk", model)
            return self._calls.stream(body, [wanted], ChatEvents(heading, shape, names))
        heading = Heading.new("chatcmpl", "chat.completion", model)
        try:
            (result,) = await self._calls.generate(request, body, [wanted])
        except ClientGoneError:
            return Response()
        return json_response(chat_document(heading, shape, result))

    def _wanted(self, request: Request, body: ChatBody, tools: OfferedTools) -> GenerateRequest:
        own = body.parameters(
            max_new_tokens=body.most_tokens,
            raw_logprobs=True,
            return_k_alternatives=body.num_logprobs() or None,
        )
        return GenerateRequest(
            prompt=_prompt(body, tools),
            parameters=self._calls.named(request, body, own),
            caller=caller_of(request),
            origin=origin_of(request),
        )


def _shape(body: ChatBody) -> ChatShape:
    options = body.stream_options
    return ChatShape(
        style=body.text_style,
        num_logprobs=body.num_logprobs(),
        wants_usage=body.wants_usage,
        usage_with_each=options is not None and options.continuous_usage_stats,
    )


def _prompt(body: ChatBody, tools: OfferedTools) -> ChatPrompt:
    messages = checked_messages(body.messages)
    # Mistral's and DeepSeek's word for it.
    has_prefix = messages[-1].pop("prefix", False) is True
    continues = has_prefix if body.continue_final_message is None else body.continue_final_message
    begins = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return ChatPrompt(
        messages=messages,
        tools=tools.definitions or None,
        tool_choice=tools.choice,
        documents=body.documents,
        template_kwargs=kwargs,
        add_generation_prompt=begins,
        continue_final_message=continues,
    )
