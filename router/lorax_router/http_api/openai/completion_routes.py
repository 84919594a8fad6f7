"""``/v1/completions``."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_contract.step import OutputKind
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.openai.answers import Heading
from lorax_router.http_api.openai.bodies import CompletionBody
from lorax_router.http_api.openai.completions import (
    CompletionEvents,
    CompletionShape,
    completion_document,
)
from lorax_router.http_api.openai.errors import OpenAIRoute
from lorax_router.http_api.openai.schemas import ERRORS, Completion, OpenAIErrorResponse
from lorax_router.http_api.openapi import event_stream, json_body
from lorax_router.http_api.origins import origin_of
from lorax_router.http_api.responses import json_response
from lorax_router.service.requests import GenerateRequest, Prompt, TextPrompt, TokenPrompt

_DEFAULT_MAX_TOKENS = 16
_MAX_PROMPTS = 512


class CompletionRoutes:
    """The handler of ``/v1/completions``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The route with its documentation."""
        router = APIRouter(tags=["openai"], route_class=OpenAIRoute)
        router.post(
            "/v1/completions",
            summary="Continue a prompt, or several",
            operation_id="create_completion",
            responses={
                200: {
                    "model": Completion,
                    "content": event_stream(Completion, OpenAIErrorResponse),
                },
                **ERRORS,
            },
            openapi_extra=json_body(CompletionBody),
        )(self.create)
        return router

    async def create(self, request: Request) -> Response:
        """Answer with all completions, or stream them."""
        body = await self._calls.read(request, CompletionBody)
        with self._calls.becoming_one(request):
            shape, requests = _shape(body), self._requests(request, body)
        heading = Heading.new("cmpl", "text_completion", self._calls.models.shown(body.model))
        if body.stream:
            return self._calls.stream(body, requests, CompletionEvents(heading, shape))
        try:
            results = await self._calls.generate(request, body, requests)
        except ClientGoneError:
            return Response()
        return json_response(completion_document(heading, shape, results))

    def _requests(self, request: Request, body: CompletionBody) -> list[GenerateRequest]:
        num_top = body.num_logprobs()
        max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if max_tokens == 0 and not body.echo:
            raise ValidationError("`max_tokens` must be above 0, except together with `echo`")
        own = body.parameters(
            best_of=body.best_of,
            max_new_tokens=max_tokens,
            output=OutputKind.TOKENS if max_tokens else OutputKind.PROMPT,
            raw_logprobs=True,
            return_k_alternatives=num_top or None,
            decoder_input_details=bool(body.echo),
            num_prompt_alternatives=num_top or None if body.echo else None,
        )
        parameters = self._calls.named(request, body, own)
        prompts = body.prompts
        if len(prompts) > _MAX_PROMPTS:
            raise ValidationError(
                f"`prompt` takes at most {_MAX_PROMPTS} prompts, got {len(prompts)}"
            )
        return [
            GenerateRequest(
                prompt=_prompt(each, body),
                parameters=parameters,
                streams_prompt=True,
                caller=caller_of(request),
                origin=origin_of(request),
            )
            for each in prompts
        ]


def _prompt(given: str | list[int], body: CompletionBody) -> Prompt:
    if isinstance(given, str):
        return TextPrompt(given, add_special_tokens=body.add_special_tokens is not False)
    return TokenPrompt(given)


def _shape(body: CompletionBody) -> CompletionShape:
    texts = [each if isinstance(each, str) else None for each in body.prompts]
    options = body.stream_options
    return CompletionShape(
        style=body.text_style,
        echoed=texts if body.echo else [],
        num_logprobs=body.num_logprobs(),
        wants_usage=body.wants_usage,
        usage_with_each=options is not None and options.continuous_usage_stats,
    )
