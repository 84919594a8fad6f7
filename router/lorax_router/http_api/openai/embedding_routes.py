"""``/v1/embeddings``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_contract.step import OutputKind
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.fan_out import answers_of, through
from lorax_router.http_api.json_text import Json
from lorax_router.http_api.openai.bodies import EmbeddingBody
from lorax_router.http_api.openai.errors import INPUT_FIELDS, InputRoute, envelope
from lorax_router.http_api.openai.schemas import (
    ERRORS,
    AdapterEmbeddings,
    AdapterError,
    CreateEmbeddingResponse,
)
from lorax_router.http_api.openapi import json_body
from lorax_router.http_api.origins import origin_of
from lorax_router.http_api.responses import json_response
from lorax_router.service.requests import (
    GenerateParameters,
    GenerateRequest,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from lorax_router.service.results import GenerateResult
from lorax_router.service.vectors import Vector, vector_of

_Answer = CreateEmbeddingResponse | list[AdapterEmbeddings | AdapterError]
# As many as OpenAI takes.
MAX_INPUTS = 2048
# Of one call: others have to fit beside it.
_AT_ONCE = 64


class EmbeddingRoutes:
    """The handler of ``/v1/embeddings``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The route with its documentation."""
        router = APIRouter(tags=["openai"], route_class=InputRoute)
        router.post(
            "/v1/embeddings",
            summary="Make a vector of a text, or of several",
            operation_id="create_embedding",
            responses={200: {"model": _Answer}, **ERRORS},
            openapi_extra=json_body(EmbeddingBody),
        )(self.create)
        return router

    async def create(self, request: Request) -> Response:
        """Answer with one vector for each input, in their order."""
        body = await self._calls.read(request, EmbeddingBody)
        with self._calls.becoming_one(request):
            requests = self._requests(request, body)
            adapters = body.adapters
            groups = (
                through(adapters, body.adapter_source, requests) if adapters is not None else []
            )
        try:
            if adapters is not None:
                found = await self._calls.answer_apart(request, groups, _AT_ONCE)
                answer = partial(_document, encoding=body.encoding_format)
                fault = partial(envelope, names=INPUT_FIELDS)
                return json_response(answers_of(adapters, found, answer, fault))
            results = await self._calls.generate(request, body, requests, _AT_ONCE)
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
            GenerateRequest(
                prompt=_prompt(each),
                parameters=parameters,
                caller=caller_of(request),
                origin=origin_of(request),
            )
            for each in inputs
        ]


def _prompt(given: str | list[int]) -> Prompt:
    return TextPrompt(given) if isinstance(given, str) else TokenPrompt(given)


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
