"""The routes that tell about the server, and the tokenizer's."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import LoraxError, ValidationError
from lorax_router.http_api.json_body import parse_body, read_body
from lorax_router.http_api.lorax.bodies import TokenizeBody
from lorax_router.http_api.lorax.encode import spans_json
from lorax_router.http_api.lorax.schemas import ErrorAnswer, InfoAnswer, TokenizeAnswerToken
from lorax_router.http_api.openapi import ERRORS, json_body
from lorax_router.http_api.responses import JSON, error_document, json_response
from lorax_router.service.inference import InferenceService
from lorax_router.service.info import ServerInfo
from lorax_router.service.metrics.exposition import TEXT_CONTENT_TYPE, to_json, to_text
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.prompts.tokenizer_pool import TokenizerPool

_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    503: {"model": ErrorAnswer, "description": "The server cannot serve requests"}
}


class OpsRoutes:
    """Handlers of health, startup, info, metrics and tokenize."""

    def __init__(
        self,
        service: InferenceService,
        tokenizer: TokenizerPool,
        metrics: Metrics,
        info: ServerInfo,
        *,
        max_body_bytes: int,
        max_input_chars: int,
    ) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._info = asdict(info)
        self._max_body_bytes = max_body_bytes
        self._max_input_chars = max_input_chars

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["server"])
        for path in ("/", "/health", "/ping"):
            router.get(
                path,
                summary="Whether requests can be served",
                operation_id=f"health_{path.strip('/') or 'root'}",
                responses=_UNHEALTHY,
            )(self.health)
        router.get(
            "/startup",
            summary="Whether a token can be generated",
            responses={500: {"model": ErrorAnswer}},
        )(self.startup)
        router.get(
            "/info",
            summary="Model and limits",
            responses={200: {"model": InfoAnswer}},
        )(self.info)
        router.get(
            "/metrics",
            summary="Metrics for Prometheus, or as JSON if the Accept header names it",
            responses={200: {"content": {"text/plain": {}, JSON: {}}}},
        )(self.metrics)
        router.post(
            "/tokenize",
            summary="Tokenize a text",
            responses={200: {"model": list[TokenizeAnswerToken]}, **ERRORS},
            openapi_extra=json_body(TokenizeBody),
        )(self.tokenize)
        return router

    async def health(self) -> Response:
        """Answer 200 when requests can be served, 503 when not."""
        await self._service.health()
        return Response()

    async def startup(self) -> Response:
        """Answer 200 after one token was generated, 500 when that failed."""
        try:
            await self._service.probe()
        except LoraxError as error:
            return json_response(error_document(error), 500)
        return Response()

    async def info(self) -> Response:
        """Answer with the model and its limits."""
        return json_response(self._info)

    async def metrics(self, request: Request) -> Response:
        """Answer with all metrics."""
        registry = self._metrics.registry
        if JSON in request.headers.get("accept", ""):
            return Response(to_json(registry), media_type=JSON)
        return Response(to_text(registry), headers={"content-type": TEXT_CONTENT_TYPE})

    async def tokenize(self, request: Request) -> Response:
        """Answer with the tokens of a text and the characters each stands for."""
        body = parse_body(TokenizeBody, await read_body(request, self._max_body_bytes))
        self._metrics.unknown_fields(body.num_unknown_fields())
        if len(body.inputs) > self._max_input_chars:
            raise ValidationError(
                f"`inputs` must have at most {self._max_input_chars} characters, "
                f"got {len(body.inputs)}; tokenize it in parts"
            )
        spans = await self._tokenizer.tokenize(
            body.inputs, add_special_tokens=body.add_special_tokens
        )
        # A long text has many tokens: their answer is written off the event loop, too.
        answer = await self._tokenizer.run(spans_json, spans)
        return Response(answer, media_type=JSON)
