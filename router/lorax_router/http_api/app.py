"""Puts the routes together into one ASGI application."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from fastapi import APIRouter, FastAPI
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from lorax_contract.config import RouterConfig
from lorax_contract.errors import LoraxError
from lorax_router.http_api.adapter_routes import AdapterRoutes
from lorax_router.http_api.admission import RoomGate, generating_paths
from lorax_router.http_api.anthropic.errors import routing_error_response
from lorax_router.http_api.auth import METRICS_PATH, PROBES, KeyGate, MetricsGate, OneCaller
from lorax_router.http_api.calls import Calls
from lorax_router.http_api.dialects import generating_routers
from lorax_router.http_api.lorax.bodies import AdapterBody, CompatGenerateBody, GenerateBody
from lorax_router.http_api.lorax.generate_routes import GenerateRoutes, RootHandler
from lorax_router.http_api.lorax.published import keywords_of
from lorax_router.http_api.lorax.schemas import StreamEvent
from lorax_router.http_api.openai.errors import http_error_response
from lorax_router.http_api.openai.lora_routes import (
    LoadLoRAAdapterRequest,
    LoraRoutes,
    UnloadLoRAAdapterRequest,
)
from lorax_router.http_api.openapi import add_keys, add_schemas
from lorax_router.http_api.ops_routes import OpsRoutes, answer_metrics
from lorax_router.http_api.playground.routes import PlaygroundRoutes
from lorax_router.http_api.refusals import speaks_anthropic, speaks_openai
from lorax_router.http_api.responses import (
    ErrorBoundary,
    HeadAsGet,
    http_exception_text,
    on_http_exception,
    on_lorax_error,
)
from lorax_router.http_api.tokenizer_bodies import DecodeBody, DetokenizeBody, TokenizeBody
from lorax_router.http_api.tokenizer_routes import TokenizerRoutes
from lorax_router.service.callers import KEYED_OPERATOR, OPERATOR
from lorax_router.service.generation import GenerationService, RequestCounts
from lorax_router.service.inference import InferenceService
from lorax_router.service.info import ServerInfo
from lorax_router.service.keys.store import KeyStore
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.prompts.tokenization import Tokenization

# Bodies of what takes an admin.
_MANAGING: tuple[type[BaseModel], ...] = (
    AdapterBody,
    LoadLoRAAdapterRequest,
    UnloadLoRAAdapterRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cors:
    """Which pages of other origins may call: none without ``origins``.

    Empty lists of headers and methods stand for what LoRAX lets pass.
    """

    origins: list[str] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    exposed_headers: list[str] = field(default_factory=list)
    credentials: bool = False

    @classmethod
    def of(cls, config: RouterConfig) -> Cors:
        """Return what a configuration allows."""
        return cls(
            origins=config.cors_allow_origin,
            headers=config.cors_allow_header,
            methods=config.cors_allow_method,
            exposed_headers=config.cors_expose_header,
            credentials=config.cors_allow_credentials,
        )


@dataclass(frozen=True, slots=True)
class GeneratingApp:
    """An application of the routes that generate, and the paths on which a POST does."""

    app: FastAPI
    paths: frozenset[str]


def build_app(
    *,
    service: InferenceService,
    tokenization: Tokenization,
    metrics: Metrics,
    info: ServerInfo,
    max_body_bytes: int,
    cors: Cors,
    adapters: AdapterRoutes | None = None,
    loras: LoraRoutes | None = None,
    playground: PlaygroundRoutes | None = None,
    root: RootHandler | None = None,
    dialects: Iterable[APIRouter] = (),
    bodies: Iterable[type[BaseModel]] = (),
    events: Iterable[type[BaseModel]] = (),
    keys: KeyStore | None = None,
) -> FastAPI:
    """Return the application for clients; it owns nothing of what it is given.

    With ``adapters`` it tells of them, with ``loras`` where they are named; ``playground`` is a page
    to try it with; ``root`` is GenerateRoutes'. ``dialects`` are
    routes of other dialects than LoRAX's, ``bodies`` what they parse, and ``events`` what they
    stream. With ``keys`` it asks for one of them.
    """
    keys = keys or KeyStore()
    app = _new_app("Text generation with many LoRA adapters on one base model.", info.version)
    counts = service.ledger
    generate = GenerateRoutes(
        service,
        counts,
        model_id=info.model_id,
        device_type=info.model_device_type,
        max_body_bytes=max_body_bytes,
        root=root,
    )
    tokenizer = TokenizerRoutes(service, tokenization, metrics, max_body_bytes=max_body_bytes)
    app.include_router(generate.router())
    app.include_router(tokenizer.router())
    app.include_router(OpsRoutes(service, metrics, info).router())
    if adapters is not None:
        app.include_router(adapters.client_router(has_keys=keys.is_on))
    if loras is not None:
        app.include_router(loras.router(has_keys=keys.is_on))
    open_paths: frozenset[str] = frozenset()
    if playground is not None:
        app.include_router(playground.router())
        open_paths = playground.open_paths
    dialects = list(dialects)
    for router in dialects:
        app.include_router(router)
    paths = generating_paths([generate.router(), *dialects])
    app.add_middleware(RoomGate, service=service, counts=counts, paths=paths)
    app.add_middleware(KeyGate, keys=keys, open_paths=open_paths)
    _complete(app)
    own: list[type[BaseModel]] = [
        GenerateBody,
        CompatGenerateBody,
        TokenizeBody,
        DetokenizeBody,
        DecodeBody,
    ]
    if keys.is_on:
        own += [*_MANAGING]
    add_schemas(app, [*own, *bodies], answers=[StreamEvent, *events], limits=keywords_of(info))
    if keys.is_on:
        add_keys(app, open_paths=PROBES)
    _allow_pages(app, cors)
    return app


def build_generating_app(
    generate: GenerateRoutes,
    calls: Calls,
    keys: KeyStore,
    cors: Cors,
    service: GenerationService,
    counts: RequestCounts,
) -> GeneratingApp:
    """Return the application of the routes that generate alone, as ``build_app`` has them."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    routers = [generate.router(), *generating_routers(calls)]
    for router in routers:
        app.include_router(router)
    paths = generating_paths(routers)
    app.add_middleware(RoomGate, service=service, counts=counts, paths=paths)
    app.add_middleware(KeyGate, keys=keys)
    _complete(app)
    _allow_pages(app, cors)
    return GeneratingApp(app, paths)


def _allow_pages(app: FastAPI, cors: Cors) -> None:
    """Let pages of other origins call."""
    if cors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors.origins,
            # Each SDK has its own, and which pages may call is said by their origins.
            allow_headers=cors.headers or ["*"],
            allow_methods=cors.methods or ["GET", "POST"],
            expose_headers=cors.exposed_headers,
            allow_credentials=cors.credentials,
        )


def build_admin_app(
    adapters: AdapterRoutes, loras: LoraRoutes, version: str, keys: KeyStore
) -> FastAPI:
    """Return the application for the server's operator; ``AdminGuard`` goes in front of it."""
    app = _new_app("Management of the adapters of this server.", version)
    app.include_router(adapters.admin_router())
    app.include_router(loras.router())
    app.add_middleware(OneCaller, caller=KEYED_OPERATOR if keys.is_on else OPERATOR)
    _complete(app)
    add_schemas(app, _MANAGING)
    return app


def build_metrics_app(metrics: Metrics, keys: KeyStore) -> ASGIApp:
    """Return the application of a listener that serves the metrics and nothing else."""
    routes = [Route(METRICS_PATH, partial(answer_metrics, metrics))]
    app = Starlette(routes=routes, exception_handlers={HTTPException: on_http_exception})
    return ErrorBoundary(HeadAsGet(MetricsGate(app, keys)))


def _new_app(description: str, version: str) -> FastAPI:
    """Return an application whose documentation comes from this process alone."""
    return FastAPIOffline(
        title="lorax-py",
        description=description,
        version=version,
        openapi_url="/api-doc/openapi.json",
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
        # It would send where the document is to a validator that others run.
        swagger_ui_parameters={"validatorUrl": None},
    )


def _complete(app: FastAPI) -> None:
    """Add what every application has around its routes."""
    app.add_exception_handler(LoraxError, on_lorax_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_aliases(app)
    # The layer added last is the outermost.
    app.add_middleware(HeadAsGet)
    app.add_middleware(ErrorBoundary)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what routing raised in the words of the dialect that the call is of."""
    assert isinstance(error, HTTPException)
    text, headers = http_exception_text(request, error), dict(error.headers or {})
    if speaks_anthropic(request.scope):
        return routing_error_response(error.status_code, text, headers)
    if speaks_openai(request.scope):
        return http_error_response(error.status_code, text, headers)
    return await on_http_exception(request, error)


def _add_aliases(app: FastAPI) -> None:
    """Serve the documentation where LoRAX and FastAPI have it, too."""
    for route in [each for each in app.routes if isinstance(each, Route)]:
        if alias := {"/docs": "/docs/", "/api-doc/openapi.json": "/openapi.json"}.get(route.path):
            app.add_route(alias, route.endpoint, include_in_schema=False)
