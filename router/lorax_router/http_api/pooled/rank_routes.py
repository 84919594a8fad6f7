"""``/rerank`` and ``/score``: texts ranked by a query, texts compared with texts."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.step import OutputKind
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.json_text import Json
from lorax_router.http_api.openai.errors import InputRoute
from lorax_router.http_api.openai.schemas import ERRORS as OPENAI_ERRORS
from lorax_router.http_api.openapi import ERRORS, json_body
from lorax_router.http_api.pooled.bodies import RerankBody, ScoreBody, SimilarityBody
from lorax_router.http_api.pooled.classify_routes import usage_of
from lorax_router.http_api.pooled.comparing import Compared, Comparing
from lorax_router.http_api.pooled.schemas import RankAnswer, RerankAnswer, ScoreAnswer
from lorax_router.http_api.responses import json_response


class RankRoutes:
    """Handlers of the routes that rank and compare texts."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._comparing = Comparing(calls)

    def router(self) -> APIRouter:
        """The routes that say what is wrong as LoRAX and TEI do, with their documentation."""
        router = APIRouter(tags=["classification"])
        for path in ("/rerank", "/v2/rerank"):
            self._add_rerank(router, path, ERRORS)
        self._add_score(router, "/score", ERRORS)
        router.post(
            "/similarity",
            summary="Tell how near texts are to another one",
            operation_id="similarity",
            responses={200: {"model": list[float]}, **ERRORS},
            openapi_extra=json_body(SimilarityBody),
        )(self.similarity)
        return router

    def versioned_router(self) -> APIRouter:
        """The same that say it as OpenAI does."""
        router = APIRouter(tags=["classification"], route_class=InputRoute)
        self._add_rerank(router, "/v1/rerank", OPENAI_ERRORS)
        self._add_score(router, "/v1/score", OPENAI_ERRORS)
        return router

    def _add_rerank(self, router: APIRouter, path: str, errors: dict[int | str, Any]) -> None:
        router.post(
            path,
            summary="Rank texts by how much they have to do with a query",
            operation_id=path.strip("/").replace("/", "_"),
            responses={200: {"model": list[RankAnswer] | RerankAnswer}, **errors},
            openapi_extra=json_body(RerankBody),
        )(self.rerank)

    def _add_score(self, router: APIRouter, path: str, errors: dict[int | str, Any]) -> None:
        router.post(
            path,
            summary="Tell how much texts have to do with each other",
            operation_id=path.strip("/").replace("/", "_"),
            responses={200: {"model": ScoreAnswer}, **errors},
            openapi_extra=json_body(ScoreBody),
        )(self.score)

    async def rerank(self, request: Request) -> Response:
        """Answer with the texts, best first; of `documents` in Cohere's shape, else in TEI's."""
        body = await self._calls.read(request, RerankBody)
        with self._calls.becoming_one(request):
            texts = body.ranked
            parameters = body.asked(self._calls, request, OutputKind.VECTOR)
        pairs = [(body.query, text) for text in texts]
        try:
            compared = await self._comparing.scores(request, body, parameters, pairs)
        except ClientGoneError:
            return Response()
        ranked = _best_first(compared.scores)[: body.top_n]
        if body.documents is None:
            return json_response(_tei_document(ranked, texts if body.return_text else None))
        return json_response(self._cohere_document(body, compared, ranked, texts))

    async def score(self, request: Request) -> Response:
        """Answer with a score for each pair, in their order."""
        body = await self._calls.read(request, ScoreBody)
        with self._calls.becoming_one(request):
            pairs = body.pairs
            parameters = body.asked(self._calls, request, OutputKind.VECTOR)
        try:
            compared = await self._comparing.scores(request, body, parameters, pairs)
        except ClientGoneError:
            return Response()
        document = {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": self._calls.models.shown(body.model),
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(compared.scores)
            ],
            "usage": usage_of(compared.num_tokens),
        }
        return json_response(document)

    async def similarity(self, request: Request) -> Response:
        """Answer with the cosine of each text's vector and the source's, in their order."""
        body = await self._calls.read(request, SimilarityBody)
        with self._calls.becoming_one(request):
            pairs = body.pairs
            parameters = body.asked(self._calls, request, OutputKind.VECTOR)
        try:
            compared = await self._comparing.by_vectors(request, body, parameters, pairs)
        except ClientGoneError:
            return Response()
        return json_response(compared.scores)

    def _cohere_document(
        self,
        body: RerankBody,
        compared: Compared,
        ranked: Sequence[tuple[int, float]],
        texts: Sequence[str],
    ) -> Json:
        shown = texts if body.return_documents else None
        return {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": self._calls.models.shown(body.model),
            "results": [
                {
                    "index": index,
                    "relevance_score": score,
                    **({} if shown is None else {"document": {"text": shown[index]}}),
                }
                for index, score in ranked
            ],
            "usage": usage_of(compared.num_tokens),
            "meta": {"tokens": {"input_tokens": compared.num_tokens}},
        }


def _best_first(scores: Sequence[float]) -> list[tuple[int, float]]:
    """Return places with their scores; equal ones stay in their order."""
    return sorted(enumerate(scores), key=lambda each: each[1], reverse=True)


def _tei_document(ranked: Sequence[tuple[int, float]], texts: Sequence[str] | None) -> list[Json]:
    return [
        {"index": index, "score": score, **({} if texts is None else {"text": texts[index]})}
        for index, score in ranked
    ]
