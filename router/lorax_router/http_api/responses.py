"""Plain JSON responses, errors among them, and the boundary that no exception passes."""

from __future__ import annotations

import logging
import uuid
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorax_contract.errors import (
    DeadlineError,
    GenerationError,
    LoraxError,
    RowFailedError,
    ShardError,
    UnauthenticatedError,
)
from lorax_router.http_api.json_text import Json, dumps

logger = logging.getLogger(__name__)

JSON = "application/json"
# Of a path, which may be as long as a head.
_MAX_SHOWN = 200
_TYPES_BY_STATUS = {404: "not_found", 405: "method_not_allowed"}


def error_document(error: LoraxError) -> Json:
    """The body of an error, as LoRAX has it."""
    return {"error": error.public, "error_type": error.kind.error_type}


def new_request_id() -> str:
    """Return the id of a call, for its answer's head and for errors."""
    return f"req_{uuid.uuid4().hex}"


def json_response(
    document: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a JSON response."""
    return Response(dumps(document), status, headers, media_type=JSON)


def error_response(error: LoraxError) -> Response:
    """Return the response of an error, by the one table of errors."""
    shown = public_error(error)
    kind = shown.kind
    return json_response(error_document(shown), kind.http_status, error_headers(shown))


def error_headers(error: LoraxError) -> dict[str, str]:
    """The headers of an error's response, whatever the dialect: when to try again, and how."""
    if isinstance(error, UnauthenticatedError):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, DeadlineError | RowFailedError):
        # SDKs send again what got a 5xx: there is no more time for that, or it would fail again.
        return {"x-should-retry": "false"}
    seconds = error.kind.retry_after_s
    return {} if seconds is None else {"retry-after": str(seconds)}


def public_error(error: LoraxError) -> LoraxError:
    """The error as a client may see it: what went on between router and shard stays inside."""
    if isinstance(error, ShardError):
        return GenerationError(str(error), public="a shard failed")
    return error


async def on_lorax_error(_request: Request, error: Exception) -> Response:
    """Answer an error of ours that a route raised."""
    assert isinstance(error, LoraxError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what routing raised: no such path, no such method."""
    assert isinstance(error, HTTPException)
    document = {
        "error": http_exception_text(request, error),
        "error_type": _TYPES_BY_STATUS.get(error.status_code, "bad_request"),
    }
    return json_response(document, error.status_code, dict(error.headers or {}))


def http_exception_text(request: Request, error: HTTPException) -> str:
    """Return what routing found, in words."""
    path = request.url.path
    shown = path if len(path) <= _MAX_SHOWN else f"{path[:_MAX_SHOWN]}…"
    return {
        404: f"there is no {shown!r} here; see /docs",
        405: f"{request.method} is not offered here; see /docs",
    }.get(error.status_code, error.detail)


class ErrorBoundary:
    """Outermost layer: an unexpected exception becomes a JSON 500 that tells nothing inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application behind the boundary."""
        started = False

        async def tracked(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, tracked)
        except ClientDisconnect:
            # It left in the middle of its body; the route has counted it.
            return
        except Exception:
            logger.exception("unexpected error in %s", scope.get("path"))
            if started:
                raise
            await error_response(LoraxError(public=""))(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET, without the body: all routes that can be read can be asked so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application as for GET, and keep the body back."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, without_body)


def compact(headers: dict[str, Any]) -> dict[str, str]:
    """Header values as text that no client, and no server, can take for more than a value."""
    return {
        name: "".join(char if " " <= char <= "~" else "?" for char in str(value))
        for name, value in headers.items()
    }
