"""Requests that generate: let in where there is room, then their bodies are read; all are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_contract.errors import LoraxError
from lorax_router.http_api.auth import caller_in, caller_of
from lorax_router.http_api.json_body import Body, parse_body, read_body
from lorax_router.http_api.model_body import ModelBody
from lorax_router.http_api.origins import origin_in, origin_of
from lorax_router.http_api.refusals import refusal
from lorax_router.service.generation import GenerationService, RequestCounts


class RoomGate:
    """Refuses what there is no room for, before it is routed and before its body is read.

    Nobody sends 2 MB to hear that there is no place, and under a flood most of what a server does
    is to refuse. Goes behind ``KeyGate``, which knows who asks.

    Args:
        app: serves those that are let in, and all other calls.
        service: knows whether there is room.
        counts: hears of refusals.
        paths: those on which a POST generates; see ``generating_paths``.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: GenerationService,
        counts: RequestCounts,
        paths: frozenset[str],
    ) -> None:
        self._app = app
        self._service = service
        self._counts = counts
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application if there is room, or answer why there is none."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._paths:
            caller = caller_in(scope)
            try:
                await self._service.ask_room(caller)
            except LoraxError as error:
                self._counts.request_refused(error, caller, origin_in(scope))
                await refusal(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def generating_paths(routers: Iterable[APIRouter]) -> frozenset[str]:
    """Return the paths to which one may POST, of routers all whose POSTs generate."""
    routes = (each for router in routers for each in router.routes)
    return frozenset(
        each.path for each in routes if isinstance(each, Route) and "POST" in (each.methods or ())
    )


async def read_admitted(
    counts: RequestCounts, request: Request, model: type[Body], max_body_bytes: int
) -> Body:
    """Read the body of a request that ``RoomGate`` let in; what fails here is counted here."""
    try:
        body = parse_body(model, await read_body(request, max_body_bytes))
        if isinstance(body, ModelBody):
            body.check_refused()
    except LoraxError as error:
        counts.request_refused(error, caller_of(request), origin_of(request))
        raise
    except ClientDisconnect:
        counts.request_refused(asyncio.CancelledError(), caller_of(request), origin_of(request))
        raise
    counts.unknown_fields(body.num_unknown_fields())
    return body


@contextmanager
def becoming_one(counts: RequestCounts, request: Request) -> Iterator[None]:
    """Within, a body becomes a request of the service's; one that does not is counted here."""
    try:
        yield
    except LoraxError as error:
        counts.request_refused(error, caller_of(request), origin_of(request))
        raise
    except Exception:
        counts.request_refused(LoraxError(public=""), caller_of(request), origin_of(request))
        raise
