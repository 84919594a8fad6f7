"""How a call over HTTP came, as its head says it: the same for all dialects."""

from __future__ import annotations

import re

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from lorax_router.service.origin import Origin

_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Where a scope keeps it once it was read: all requests of a call have one object.
_READ = "lorax.origin"


def origin_of(request: Request) -> Origin:
    """Return how a request came."""
    return origin_in(request.scope)


def origin_in(scope: Scope) -> Origin:
    """Return how the call came that a scope is of; its path is one that generates."""
    origin: Origin | None = scope.get(_READ)
    if origin is None:
        origin = scope[_READ] = _read(scope)
    return origin


def _read(scope: Scope) -> Origin:
    headers = Headers(scope=scope)
    given = headers.get("x-request-id", "")
    return Origin(
        protocol="http",
        call=scope["path"],
        request_id=given if _GIVEN_ID.fullmatch(given) else "",
        traceparent=headers.get("traceparent", ""),
        # Several are one list.
        tracestate=",".join(headers.getlist("tracestate")),
    )
