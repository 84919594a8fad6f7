"""The routes that tell about the server."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_router.http_api.lorax.schemas import InfoAnswer
from lorax_router.http_api.openapi import ANYWHERE, errors
from lorax_router.http_api.responses import JSON, error_document, json_response
from lorax_router.service.inference import InferenceService
from lorax_router.service.info import ServerInfo
from lorax_router.service.metrics.exposition import TEXT_CONTENT_TYPE, to_json, to_text
from lorax_router.service.metrics.recorder import Metrics

_UNHEALTHY = {**ANYWHERE, **errors({503: "The server cannot serve requests"})}
_METRICS = {"text/plain": {"schema": {"type": "string"}}, JSON: {"schema": {"type": "object"}}}
_FORMAT = {
    "name": "format",
    "in": "query",
    "description": "`json` for JSON, whatever the Accept header says.",
    "schema": {"type": "string", "enum": ["prometheus", "json"]},
}


class OpsRoutes:
    """Handlers of health, startup, info and metrics."""

    def __init__(self, service: InferenceService, metrics: Metrics, info: ServerInfo) -> None:
        self._service = service
        self._metrics = metrics
        self._info = asdict(info)

    def router(self) -> APIRouter:
        """The routes with their documentation."""
        router = APIRouter(tags=["LoRAX"])
        for path in ("/", "/health", "/ping"):
            router.get(
                path,
                summary="Whether requests can be served",
                operation_id=f"health_{path.strip('/') or 'root'}",
                response_class=Response,
                responses=_UNHEALTHY,
            )(self.health)
        router.get(
            "/startup",
            summary="Whether a token can be generated",
            operation_id="startup",
            response_class=Response,
            responses={**ANYWHERE, **errors({500: "No token could be generated"})},
        )(self.startup)
        router.get(
            "/info",
            summary="Model and limits",
            operation_id="get_model_info",
            responses={200: {"model": InfoAnswer}, **ANYWHERE},
        )(self.info)
        router.get(
            "/metrics",
            summary="Metrics for Prometheus, or as JSON if the Accept header names it",
            operation_id="metrics",
            response_class=Response,
            responses={200: {"content": _METRICS}, **ANYWHERE},
            openapi_extra={"parameters": [_FORMAT]},
        )(self.metrics)
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
        return await answer_metrics(self._metrics, request)


async def answer_metrics(metrics: Metrics, request: Request) -> Response:
    """Answer with all metrics, in the form that the caller reads."""
    registry = metrics.registry
    form = request.query_params.get("format", "").lower()
    if form == "json" or (not form and JSON in request.headers.get("accept", "")):
        return Response(to_json(registry), media_type=JSON)
    return Response(to_text(registry), headers={"content-type": TEXT_CONTENT_TYPE})
