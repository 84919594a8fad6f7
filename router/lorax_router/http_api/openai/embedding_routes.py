"""``/v1/embeddings``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_contract.step import OutputKind
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.fan_out import answers_of, fanned
from lorax_router.http_api.json_text import Json
from lorax_router.http_api.openai.bodies import EmbeddingBody
from lorax_router.http_api.openai.errors import INPUT_FIELDS, InputRoute, envelope
from lorax_router.http_api.openai.schemas import (
    ERRORS,
    AdapterEmbeddings,
    AdapterError,
    CreateEmbeddingResponse,
)
from lorax_router.http_api.openapi import ERRORS as LORAX_ERRORS
from lorax_router.http_api.openapi import json_body
from lorax_router.http_api.pooled.asking import AT_ONCE, pooled_request
from lorax_router.http_api.responses import json_response
from lorax_router.service.requests import (
    GenerateParameters,
    GenerateRequest,
    TokenPrompt,
)
from lorax_router.service.results import GenerateResult
from lorax_router.service.vectors import Vector, vector_of

_Answer = CreateEmbeddingResponse | list[AdapterEmbeddings | AdapterError]
# As many as OpenAI takes.
MAX_INPUTS = 2048


class EmbeddingRoutes:
    """The handler of ``/v1/embeddings``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The route with its documentation."""
        router = APIRouter(tags=["openai"], route_class=InputRoute)
        self._add(router, "/v1/embeddings", "create_embedding", ERRORS)
        return router

    def unversioned_router(self) -> APIRouter:
        """TEI's other name for the route, where errors are LoRAX's."""
        router = APIRouter(tags=["openai"])
        self._add(router, "/embeddings", "embeddings", LORAX_ERRORS)
        return router

    def _add(
        self, router: APIRouter, path: str, operation_id: str, errors: dict[int | str, Any]
    ) -> None:
        router.post(
            path,
            summary="Make a vector of a text, or of several",
            operation_id=operation_id,
            responses={200: {"model": _Answer}, **errors},
            openapi_extra=json_body(EmbeddingBody),
        )(self.create)

    async def create(self, request: Request) -> Response:
        """Answer with one vector for each input, in their order."""
        body = await self._calls.read(request, EmbeddingBody)
        with self._calls.becoming_one(request):
            requests = self._requests(request, body)
            adapters = body.adapters
            if adapters is not None:
                requests = fanned(adapters, body.adapter_source, requests)
        try:
            if adapters is not None:
                found = await self._calls.answer_apart(request, requests, adapters, AT_ONCE)
                answer = partial(_document, encoding=body.encoding_format)
                fault = partial(envelope, names=INPUT_FIELDS)
                return json_response(answers_of(adapters, found, answer, fault))
            results = await self._calls.generate(request, body, requests, AT_ONCE)
        except ClientGoneError:
            return Response()
        model = self._calls.models.shown(body.model)
        return json_response(_document(model, results, body.encoding_format))

    def _requests(self, request: Request, body: EmbeddingBody) -> list[GenerateRequest]:
        own = GenerateParameters(
            output=OutputKind.VECTOR,
            pooling=body.pooled_by,
            normalize=body.normalize,
            dimensions=body.dimensions,
            prompt_name=body.prompt_name,
            cut_to=body.cut_to,
            priority=body.priority,
        )
        parameters = self._calls.named(request, body, own)
        inputs = body.inputs
        if len(inputs) > MAX_INPUTS:
            raise ValidationError(f"`input` takes at most {MAX_INPUTS} texts, got {len(inputs)}")
        return [
            pooled_request(
                request, each if isinstance(each, str) else TokenPrompt(each), parameters
            )
            for each in inputs
        ]


def _document(model: str, results: Sequence[GenerateResult], encoding: str | None) -> Json:
    num_tokens = sum(result.num_prompt_tokens for result in results)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector_of(result), encoding)}
        for index, result in enumerate(results)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _encoded(vector: Vector, encoding: str | None) -> str | Vector:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector
