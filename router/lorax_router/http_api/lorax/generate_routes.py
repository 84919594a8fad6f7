"""The routes that generate text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_router.http_api.admission import becoming_one, read_admitted
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.disconnect import ClientGoneError, while_present
from lorax_router.http_api.fan_out import answers_of, fanned
from lorax_router.http_api.json_body import Body, bearer_token
from lorax_router.http_api.lorax.bodies import (
    CompatGenerateBody,
    GenerateBody,
)
from lorax_router.http_api.lorax.encode import LoraxEvents, result_document
from lorax_router.http_api.lorax.published import HEADERS
from lorax_router.http_api.lorax.schemas import FannedAnswer, GenerateAnswer, StreamEvent
from lorax_router.http_api.openapi import ERRORS, event_stream, json_body
from lorax_router.http_api.origins import origin_of
from lorax_router.http_api.pooled.schemas import AdapterFault
from lorax_router.http_api.responses import compact, json_response
from lorax_router.http_api.sse import TokenEvents
from lorax_router.http_api.terms_headers import with_terms
from lorax_router.http_api.timeout_header import timeout_of
from lorax_router.service.generation import GenerationService, RequestCounts
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.results import AdapterUse, GenerateResult

_HEADERS = {
    name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()
}


RootHandler = Callable[[Request], Awaitable[Response]]


class GenerateRoutes:
    """Handlers of ``/``, ``/invocations``, ``/generate`` and ``/generate_stream``."""

    def __init__(
        self,
        service: GenerationService,
        counts: RequestCounts,
        *,
        model_id: str,
        device_type: str,
        max_body_bytes: int,
        root: RootHandler | None = None,
    ) -> None:
        """``root`` answers at ``/`` and ``/invocations`` in place of a model that generates nothing."""
        self._service = service
        self._counts = counts
        self._max_body_bytes = max_body_bytes
        self._root = root
        device = "gpu" if device_type == "cuda" else device_type
        self._headers = compact({"x-compute-type": f"{device}+optimized", "x-model-id": model_id})

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["LoRAX"])
        answer = {
            "model": list[GenerateAnswer],
            "headers": _HEADERS,
            "content": event_stream(StreamEvent),
        }
        compat: dict[str, Any] = {
            "summary": "Generate text or a stream of tokens",
            "responses": {200: answer, **ERRORS},
            "openapi_extra": json_body(CompatGenerateBody),
        }
        router.post("/", operation_id="compat_generate", **compat)(self.compat)
        router.post("/invocations", operation_id="invocations", **compat)(self.compat)
        router.post(
            "/generate",
            summary="Generate text",
            operation_id="generate",
            responses={
                200: {
                    "model": GenerateAnswer | list[FannedAnswer | AdapterFault],
                    "headers": _HEADERS,
                },
                **ERRORS,
            },
            openapi_extra=json_body(GenerateBody),
        )(self.generate)
        router.post(
            "/generate_stream",
            summary="Generate a stream of tokens",
            operation_id="generate_stream",
            response_class=Response,
            responses={200: {"content": event_stream(StreamEvent)}, **ERRORS},
            openapi_extra=json_body(GenerateBody),
        )(self.generate_stream)
        return router

    async def compat(self, request: Request) -> Response:
        """Answer with an array of one text, or with events if ``stream`` is set."""
        if self._root is not None:
            return await self._root(request)
        body = await self._body(request, CompatGenerateBody)
        domain = self._domain(body, request)
        if body.stream:
            return self._events(domain)
        return await self._answer(request, domain, as_array=True)

    async def generate(self, request: Request) -> Response:
        """Answer with one text, or with one for each of several adapters."""
        body = await self._body(request, GenerateBody)
        if body.adapters is not None:
            return await self._answer_apart(request, body, body.adapters)
        domain = self._domain(body, request)
        return await self._answer(request, domain, as_array=False)

    async def generate_stream(self, request: Request) -> Response:
        """Answer with one event per token."""
        body = await self._body(request, GenerateBody)
        return self._events(self._domain(body, request))

    async def _body(self, request: Request, model: type[Body]) -> Body:
        """Read the body of a request that can be served; what fails here is counted here."""
        return await read_admitted(self._counts, request, model, self._max_body_bytes)

    def _domain(self, body: GenerateBody, request: Request) -> GenerateRequest:
        """Return a request as the service takes it; what fails here is counted here."""
        with becoming_one(self._counts, request):
            if body.adapters is not None:
                raise ValidationError(
                    "`adapters` are answered as a whole: send them to /generate, or a request for "
                    "each"
                )
            return _of_one(body, request)

    def _events(self, domain: GenerateRequest) -> Response:
        def use(adapter: AdapterUse) -> None:
            """Name the adapter in the head, as soon as it is known which it is."""
            events.headers.update(adapter_headers(adapter.id, adapter.source))

        headers = {**self._headers, "x-compute-characters": str(len(domain.sent_text))}
        opening = partial(self._service.generate_stream, domain, use)
        events = TokenEvents(opening, LoraxEvents(), headers)
        return events

    async def _answer(
        self, request: Request, domain: GenerateRequest, *, as_array: bool
    ) -> Response:
        try:
            result = await while_present(request.receive, self._service.generate(domain))
        except ClientGoneError:
            return Response()
        document = result_document(result)
        used = result.adapter
        named = adapter_headers(used.id, used.source) if used is not None else {}
        if used is not None and used.warning:
            named["x-adapter-warning"] = used.warning
        headers = {**self._headers, **named, **timing_headers(result)}
        return json_response([document] if as_array else document, headers=headers)

    async def _answer_apart(
        self, request: Request, body: GenerateBody, adapters: list[str]
    ) -> Response:
        with becoming_one(self._counts, request):
            (domain,) = fanned(adapters, None, [_of_one(body, request)])
        try:
            found = await while_present(
                request.receive, self._service.generate_through(domain, adapters)
            )
        except ClientGoneError:
            return Response()
        said = answers_of(adapters, found, lambda _, each: result_document(each))
        return json_response(said, headers=self._headers)


def _of_one(body: GenerateBody, request: Request) -> GenerateRequest:
    domain = body.to_domain(bearer_token(request), caller_of(request), origin_of(request))
    terms = with_terms(request, domain.parameters)
    return replace(domain, parameters=replace(terms, timeout_s=timeout_of(request)))


def timing_headers(result: GenerateResult) -> dict[str, str]:
    """LoRAX's headers of lengths and of times in whole milliseconds."""
    timings, num = result.timings, result.sequences[0].num_generated
    seconds = {
        "x-compute-time": timings.total_s,
        "x-total-time": timings.total_s,
        "x-validation-time": timings.validation_s,
        "x-queue-time": timings.queue_s,
        "x-inference-time": timings.inference_s,
        "x-time-per-token": timings.per_token_s(num),
        "x-time-to-first-token": timings.first_token_s,
        "x-time-per-output-token": timings.per_output_token_s(num),
    }
    counts = {
        "x-compute-characters": result.num_prompt_chars,
        "x-prompt-tokens": result.num_prompt_tokens,
        "x-cached-tokens": result.num_cached_tokens,
        "x-generated-tokens": num,
        "x-skipped-tokens": result.num_skipped_tokens,
        "x-total-tokens": result.num_prompt_tokens + num,
    }
    if result.adapter is not None:
        for phase, value in result.adapter.phases.items():
            seconds[f"x-adapter-{phase}-time"] = value
    in_ms = {name: str(round(value * 1e3)) for name, value in seconds.items()}
    return {**in_ms, **{name: str(value) for name, value in counts.items()}}


def adapter_headers(adapter_id: str | None, source: str | None) -> dict[str, str]:
    """LoRAX's headers of the adapter that a request named; W2: safe whatever the name is."""
    if not adapter_id:
        return {}
    sourced = {"x-adapter-source": source} if source else {}
    return compact({"x-adapter-id": adapter_id, **sourced})
