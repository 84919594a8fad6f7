"""``/embed``, as LoRAX and TEI have it."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.step import OutputKind
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.fan_out import answers_of, through
from lorax_router.http_api.openapi import ERRORS, json_body
from lorax_router.http_api.origins import origin_of
from lorax_router.http_api.pooled.bodies import EmbedBody
from lorax_router.http_api.pooled.classify_routes import AT_ONCE
from lorax_router.http_api.pooled.schemas import AdapterFault
from lorax_router.http_api.responses import json_response
from lorax_router.service.requests import GenerateRequest, TextPrompt
from lorax_router.service.results import GenerateResult
from lorax_router.service.vectors import Vector, vector_of


class EmbedAnswer(BaseModel):
    """The vector of a text."""

    embeddings: list[float]


class AdapterVectors(BaseModel):
    """The vector of a text, or of each, through one of several adapters."""

    adapter_id: str
    embeddings: list[float] | list[list[float]]


class EmbedRoutes:
    """The handler of ``/embed``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The route with its documentation."""
        router = APIRouter(tags=["LoRAX"])
        answer = EmbedAnswer | list[list[float]] | list[AdapterVectors | AdapterFault]
        router.post(
            "/embed",
            summary="Make a vector of a text, or of several",
            operation_id="embed",
            responses={200: {"model": answer}, **ERRORS},
            openapi_extra=json_body(EmbedBody),
        )(self.embed)
        return router

    async def embed(self, request: Request) -> Response:
        """Answer with the vector of a text in LoRAX's shape, or with those of several in TEI's."""
        body = await self._calls.read(request, EmbedBody)
        with self._calls.becoming_one(request):
            requests = self._requests(request, body)
            adapters = body.adapters
            groups = (
                through(adapters, body.adapter_source, requests) if adapters is not None else []
            )
        try:
            if adapters is not None:
                found = await self._calls.answer_apart(request, groups, AT_ONCE)
                said = answers_of(
                    adapters, found, lambda _, each: {"embeddings": _vectors(body, each)}
                )
                return json_response(said)
            results = await self._calls.generate(request, body, requests, AT_ONCE)
        except ClientGoneError:
            return Response()
        vectors = _vectors(body, results)
        return json_response(vectors if body.is_list else {"embeddings": vectors})

    def _requests(self, request: Request, body: EmbedBody) -> list[GenerateRequest]:
        texts = body.texts
        parameters = replace(
            body.asked(self._calls, request, OutputKind.VECTOR),
            normalize=body.normalize,
            prompt_name=body.prompt_name,
            dimensions=body.dimensions,
        )
        return [
            GenerateRequest(
                prompt=TextPrompt(text),
                parameters=parameters,
                caller=caller_of(request),
                origin=origin_of(request),
            )
            for text in texts
        ]


def _vectors(body: EmbedBody, results: list[GenerateResult]) -> list[Vector] | Vector:
    """Return the vectors of texts, or the numbers of an only one's."""
    vectors = [vector_of(result) for result in results]
    return vectors if body.is_list else vectors[0]
