"""LoRAX's ``/embed``."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_contract.step import OutputKind
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.disconnect import ClientGoneError
from lorax_router.http_api.json_body import bearer_token
from lorax_router.http_api.lorax.bodies import EmbedBody
from lorax_router.http_api.openapi import ERRORS, json_body
from lorax_router.http_api.origins import origin_of
from lorax_router.http_api.responses import json_response
from lorax_router.http_api.terms_headers import with_terms
from lorax_router.http_api.timeout_header import timeout_of
from lorax_router.service.requests import GenerateRequest, TextPrompt
from lorax_router.service.vectors import vector_of


class EmbedAnswer(BaseModel):
    """The vector of a text."""

    embeddings: list[float]


class EmbedRoutes:
    """The handler of ``/embed``."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def router(self) -> APIRouter:
        """The route with its documentation."""
        router = APIRouter(tags=["LoRAX"])
        router.post(
            "/embed",
            summary="Make a vector of a text",
            operation_id="embed",
            responses={200: {"model": EmbedAnswer}, **ERRORS},
            openapi_extra=json_body(EmbedBody),
        )(self.embed)
        return router

    async def embed(self, request: Request) -> Response:
        """Answer with the vector of one text, of length one."""
        body = await self._calls.read(request, EmbedBody)
        with self._calls.becoming_one(request):
            domain = self._domain(request, body)
        try:
            results = await self._calls.answer(request, [domain])
        except ClientGoneError:
            return Response()
        return json_response({"embeddings": vector_of(results[0]).tolist()})

    @staticmethod
    def _domain(request: Request, body: EmbedBody) -> GenerateRequest:
        if body.stream:
            raise ValidationError("`stream` is not offered for a vector; leave it out")
        parameters = body.to_parameters(bearer_token(request))
        return GenerateRequest(
            prompt=TextPrompt(body.inputs),
            parameters=replace(
                with_terms(request, parameters),
                output=OutputKind.VECTOR,
                timeout_s=timeout_of(request),
            ),
            caller=caller_of(request),
            origin=origin_of(request),
        )
