"""``/embed``, as LoRAX and TEI have it, and TEI's for vectors of tokens."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import Pooling
from lorax_contract.step import OutputKind
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.fan_out import answers_of, through
from lorax_router.http_api.openapi import ERRORS, json_body
from lorax_router.http_api.pooled.asking import AT_ONCE, pooled_request
from lorax_router.http_api.pooled.bodies import EmbedAllBody, EmbedBody
from lorax_router.http_api.pooled.schemas import AdapterFault
from lorax_router.http_api.responses import json_response
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.results import GenerateResult
from lorax_router.service.vectors import Vector, vector_of, vectors_of


class EmbedAnswer(BaseModel):
    """The vector of a text."""

    embeddings: list[float]


class AdapterVectors(BaseModel):
    """The vector of a text, or of each, through one of several adapters."""

    adapter_id: str
    embeddings: list[float] | list[list[float]]


class EmbedRoutes:
    """Handlers of ``/embed``, ``/embed_all`` and ``/embed_sparse``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["LoRAX"])
        answer = EmbedAnswer | list[list[float]] | list[AdapterVectors | AdapterFault]
        router.post(
            "/embed",
            summary="Make a vector of a text, or of several",
            operation_id="embed",
            responses={200: {"model": answer}, **ERRORS},
            openapi_extra=json_body(EmbedBody),
        )(self.embed)
        router.post(
            "/embed_all",
            summary="Make a vector of each token of a text, or of several",
            operation_id="embed_all",
            responses={200: {"model": list[list[list[float]]]}, **ERRORS},
            openapi_extra=json_body(EmbedAllBody),
        )(self.embed_all)
        router.post(
            "/embed_sparse",
            summary="Refused: no sparse vectors are made here",
            operation_id="embed_sparse",
            responses={**ERRORS},
            openapi_extra=json_body(EmbedAllBody),
        )(self.embed_sparse)
        return router

    async def embed(self, request: Request) -> Response:
        """Answer with the vector of a text in LoRAX's shape, or with those of several in TEI's."""
        body = await self._calls.read(request, EmbedBody)
        return await self._answer(request, body, is_list=body.is_list)

    async def embed_listed(self, request: Request) -> Response:
        """Answer with a list of vectors, whatever was sent: TEI's answer."""
        body = await self._calls.read(request, EmbedBody)
        return await self._answer(request, body, is_list=True)

    async def embed_all(self, request: Request) -> Response:
        """Answer with a vector for each token of each text."""
        body = await self._calls.read(request, EmbedAllBody)
        with self._calls.becoming_one(request):
            parameters = replace(
                body.asked(self._calls, request, OutputKind.VECTOR),
                pooling=Pooling.EACH,
                normalize=False,
                prompt_name=body.prompt_name,
            )
            requests = [pooled_request(request, text, parameters) for text in body.texts]
        try:
            results = await self._calls.generate(request, body, requests, AT_ONCE)
        except ClientGoneError:
            return Response()
        return json_response([vectors_of(result) for result in results])

    async def embed_sparse(self, request: Request) -> Response:
        """Refuse what no model here does."""
        await self._calls.read(request, EmbedAllBody)
        with self._calls.becoming_one(request):
            raise ValidationError(
                "this server makes no sparse vectors (SPLADE); send texts to `/embed` for dense ones"
            )

    async def _answer(self, request: Request, body: EmbedBody, *, is_list: bool) -> Response:
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
                    adapters, found, lambda _, each: {"embeddings": _vectors(each, is_list)}
                )
                return json_response(said)
            results = await self._calls.generate(request, body, requests, AT_ONCE)
        except ClientGoneError:
            return Response()
        vectors = _vectors(results, is_list)
        return json_response(vectors if is_list else {"embeddings": vectors})

    def _requests(self, request: Request, body: EmbedBody) -> list[GenerateRequest]:
        texts = body.texts
        parameters = replace(
            body.asked(self._calls, request, OutputKind.VECTOR),
            normalize=body.normalize,
            prompt_name=body.prompt_name,
            dimensions=body.dimensions,
        )
        return [pooled_request(request, text, parameters) for text in texts]


def _vectors(results: list[GenerateResult], is_list: bool) -> list[Vector] | Vector:
    """Return the vectors of texts, or the numbers of an only one's."""
    vectors = [vector_of(result) for result in results]
    return vectors if is_list else vectors[0]
