"""``/embed``, as LoRAX and TEI have it, and TEI's for vectors of tokens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_contract.pooling import Pooling
from lorax_contract.step import OutputKind
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.fan_out import answers_of, fanned
from lorax_router.http_api.json_text import dumps
from lorax_router.http_api.openapi import ERRORS, json_body
from lorax_router.http_api.pooled.asking import AT_ONCE, pooled_request
from lorax_router.http_api.pooled.bodies import EmbedAllBody, EmbedBody
from lorax_router.http_api.pooled.schemas import AdapterFault
from lorax_router.http_api.responses import JSON, json_response
from lorax_router.service.requests import GenerateRequest
from lorax_router.service.results import GenerateResult
from lorax_router.service.vectors import (
    MOST_TOKEN_NUMBERS,
    Vector,
    too_many_numbers,
    vector_of,
    vectors_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Texts whose tokens have vectors, of one call at a time.
_OF_TOKENS_AT_ONCE = 4
_NUMBERS_AT_ONCE = 1 << 15


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
            answers = [each async for each in self._token_vectors(request, body, requests)]
        except ClientGoneError:
            return Response()
        return Response(b"[" + b",".join(answers) + b"]", media_type=JSON)

    async def _token_vectors(
        self, request: Request, body: EmbedAllBody, requests: list[GenerateRequest]
    ) -> AsyncIterator[bytes]:
        """Yield the vectors of each text's tokens as JSON; ValidationError if they are too many."""
        num = 0
        for start in range(0, len(requests), _OF_TOKENS_AT_ONCE):
            some = requests[start : start + _OF_TOKENS_AT_ONCE]
            for result in await self._calls.generate(request, body, some):
                vectors = vectors_of(result)
                num += vectors.size
                if num > MOST_TOKEN_NUMBERS:
                    raise too_many_numbers(num)
                yield await asyncio.to_thread(_rows_json, vectors)

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
            if adapters is not None:
                requests = fanned(adapters, body.adapter_source, requests)
        try:
            if adapters is not None:
                found = await self._calls.answer_apart(request, requests, adapters, AT_ONCE)
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


def _rows_json(vectors: NDArray[np.float32]) -> bytes:
    """Write vectors (n x size) in slices, so that other threads get their turn."""
    step = max(1, _NUMBERS_AT_ONCE // vectors.shape[1])
    parts = [dumps(vectors[row : row + step])[1:-1] for row in range(0, len(vectors), step)]
    return b"[" + b",".join(parts) + b"]"


def _vectors(results: list[GenerateResult], is_list: bool) -> list[Vector] | Vector:
    """Return the vectors of texts, or the numbers of an only one's."""
    vectors = [vector_of(result) for result in results]
    return vectors if is_list else vectors[0]
