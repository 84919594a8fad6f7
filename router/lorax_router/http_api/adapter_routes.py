"""The routes of adapters: what is known is told to clients, managing is for the server's operator.

Managing has routes on a listener of its own. Where clients ask, it takes an admin key; pins, a key
whose tenant may keep some.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.errors import ValidationError
from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.json_body import bearer_token, parse_body, read_body
from lorax_router.http_api.lorax.bodies import AdapterBody
from lorax_router.http_api.lorax.schemas import (
    AdapterAnswer,
    AdapterList,
    ReloadAnswer,
    UnloadAnswer,
)
from lorax_router.http_api.openapi import ANYWHERE, ERRORS, errors, json_body
from lorax_router.http_api.responses import json_response
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.listing import (
    DEFAULT_PAGE,
    LARGEST_PAGE,
    LISTED_SOURCES,
    STATES,
    ListQuery,
)
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.adapters.selection import SelectionPolicy
from lorax_router.service.callers import Caller
from lorax_router.service.inference import InferenceService
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.service.requests import BASE_MODEL_ADAPTER_ID

_NOT_LOADED = errors({404: "The adapter is not loaded"})
_NOT_ALLOWED = errors(
    {403: "The caller may not do that, or calls from a browser, through a proxy or from elsewhere"}
)
_LIST_PARAMETERS = [
    {"name": name, "in": "query", "description": text, "schema": schema}
    for name, text, schema in (
        (
            "limit",
            "Most adapters on the page.",
            {"type": "integer", "minimum": 1, "maximum": LARGEST_PAGE, "default": DEFAULT_PAGE},
        ),
        ("cursor", "`next_cursor` of the page before.", {"type": "string"}),
        ("adapter_id", "Only this id, with or without its revision.", {"type": "string"}),
        ("adapter_source", "Only this source.", {"type": "string", "enum": [*LISTED_SOURCES]}),
        ("state", "Only this state.", {"type": "string", "enum": [*STATES]}),
    )
]
_LISTED = {each["name"] for each in _LIST_PARAMETERS}
# What tenants may do that have a quota of pins.
_PINNING = ("pin", "unpin")
Handler = Callable[[AdapterSelection, AdapterBody, Caller], Awaitable[dict[str, Any]]]
Endpoint = Callable[[Request], Awaitable[Response]]


class AdapterRoutes:
    """Handlers of ``/v1/adapters`` and what is below it."""

    def __init__(
        self,
        service: InferenceService,
        manager: AdapterManager,
        selections: SelectionPolicy,
        metrics: Metrics,
        *,
        max_body_bytes: int,
    ) -> None:
        self._service = service
        self._manager = manager
        self._selections = selections
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    def client_router(self, *, has_keys: bool = False) -> APIRouter:
        """The routes where clients ask, with their documentation; ``has_keys``: some may manage."""
        router = self._list_router()
        for verb, summary, answer, handler in self._verbs():
            self._add(
                router, verb, summary, answer, self._guarded(verb, handler), in_schema=has_keys
            )
        return router

    def admin_router(self) -> APIRouter:
        """The routes of the operator's listener, with their documentation."""
        router = self._list_router()
        for verb, summary, answer, handler in self._verbs():
            self._add(router, verb, summary, answer, handler)
        return router

    def _add(
        self,
        router: APIRouter,
        verb: str,
        summary: str,
        answer: type[BaseModel],
        handler: Endpoint,
        *,
        in_schema: bool = True,
    ) -> None:
        not_loaded = {} if verb == "load" else _NOT_LOADED
        router.post(
            f"/{verb}",
            summary=summary,
            operation_id=f"{verb}_adapter",
            responses={200: {"model": answer}, **not_loaded, **_NOT_ALLOWED, **ERRORS},
            openapi_extra=json_body(AdapterBody),
            include_in_schema=in_schema,
        )(handler)

    def _guarded(self, verb: str, handler: Endpoint) -> Endpoint:
        """A handler for those only who may do that."""

        async def guarded(request: Request) -> Response:
            caller = caller_of(request)
            if not (verb in _PINNING and caller.quotas.pins):
                caller.check_admin()
            return await handler(request)

        return guarded

    def _list_router(self) -> APIRouter:
        router = APIRouter(tags=["adapters"], prefix="/v1/adapters")
        router.get(
            "",
            summary="Known adapters with their state and what they take in each tier, page by page",
            description="Private adapters are listed for callers whose Bearer token opened them.",
            operation_id="list_adapters",
            responses={
                200: {"model": AdapterList},
                **ANYWHERE,
                422: ERRORS[422],
                424: ERRORS[424],
            },
            openapi_extra={"parameters": _LIST_PARAMETERS},
        )(self.list)
        return router

    def _verbs(self) -> tuple[tuple[str, str, type[BaseModel], Endpoint], ...]:
        load = "Have an adapter ready, and keep it if `pin` is set"
        unload = "Free an adapter once its requests are done"
        return (
            ("load", load, AdapterAnswer, self.load),
            ("unload", unload, UnloadAnswer, self.unload),
            ("pin", "Keep an adapter ready", AdapterAnswer, self.pin),
            ("unpin", "Let an adapter be evicted again", AdapterAnswer, self.unpin),
            ("reload", "Ask an adapter's source anew", ReloadAnswer, self.reload),
        )

    async def list(self, request: Request) -> Response:
        """Answer with a page of the known adapters."""
        query = _list_query(request.query_params)
        caller = caller_of(request)
        return json_response(
            await self._manager.pages.listing(query, bearer_token(request), caller)
        )

    async def load(self, request: Request) -> Response:
        """Answer when the adapter is there."""
        return await self._answer(request, self._load)

    async def unload(self, request: Request) -> Response:
        """Answer when its memory is free."""
        return await self._answer(request, self._unload)

    async def pin(self, request: Request) -> Response:
        """Answer when the adapter is there to stay."""
        return await self._answer(request, self._pin)

    async def unpin(self, request: Request) -> Response:
        """Answer when others may take its place."""
        return await self._answer(request, self._unpin)

    async def reload(self, request: Request) -> Response:
        """Answer when the source was asked."""
        return await self._answer(request, self._reload)

    async def _load(
        self, selection: AdapterSelection, body: AdapterBody, caller: Caller
    ) -> dict[str, Any]:
        if body.alias is None:
            return await self._manager.load(selection, caller, pin=body.pin)
        alias = self._selections.aliases.make(body.alias, selection)
        return await self._manager.name(alias, caller, pin=body.pin)

    async def _unload(
        self, selection: AdapterSelection, _: AdapterBody, caller: Caller
    ) -> dict[str, Any]:
        return await self._manager.unload(selection, caller)

    async def _pin(
        self, selection: AdapterSelection, _: AdapterBody, caller: Caller
    ) -> dict[str, Any]:
        return await self._manager.pin(selection, caller)

    async def _unpin(
        self, selection: AdapterSelection, _: AdapterBody, caller: Caller
    ) -> dict[str, Any]:
        return await self._manager.unpin(selection, caller)

    async def _reload(
        self, selection: AdapterSelection, _: AdapterBody, caller: Caller
    ) -> dict[str, Any]:
        return await self._manager.reload(selection, caller)

    async def _answer(self, request: Request, handler: Handler) -> Response:
        self._service.check_open()
        body = parse_body(AdapterBody, await read_body(request, self._max_body_bytes))
        self._metrics.unknown_fields(body.num_unknown_fields())
        selection = self._selections.selection_of(body.to_domain(bearer_token(request)))
        if selection is None or body.adapter_id in ("", BASE_MODEL_ADAPTER_ID):
            raise ValidationError("`adapter_id` must name an adapter")
        return json_response(await handler(selection, body, caller_of(request)))


def _list_query(params: Mapping[str, str]) -> ListQuery:
    """Read the parameters of a list; raises ValidationError."""
    values: dict[str, Any] = {name: text for name, text in params.items() if name in _LISTED}
    if (limit := values.get("limit")) is not None:
        if not (limit.isascii() and limit.isdecimal() and len(limit) < 10):
            raise ValidationError(f"`limit` must be a number from 1 to {LARGEST_PAGE}")
        values["limit"] = int(limit)
    return ListQuery(**values)
