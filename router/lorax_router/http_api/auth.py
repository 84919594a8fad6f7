"""Who asks over HTTP: decided here once, for every dialect and before a body is read.

A key comes as ``Authorization: Bearer`` or, from Anthropic's clients, as ``x-api-key``. Without
keys in the server everybody is the same caller, and a Bearer token is one for the hub.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_contract.errors import ForbiddenError, LoraxError
from lorax_router.http_api.refusals import refusal
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.keys.keyring import keys_in
from lorax_router.service.keys.store import KeyStore

METRICS_PATH = "/metrics"
# What tells orchestrators and balancers whether the server lives; asks for no key.
PROBES = frozenset(("/", "/health", "/ping", "/startup"))
_CALLER = "lorax.caller"


class KeyGate:
    """Lets calls through that may be made, with who makes them; answers the others itself.

    ``open_paths`` can be read without a key, beside the probes.
    """

    def __init__(
        self, app: ASGIApp, keys: KeyStore, open_paths: frozenset[str] = frozenset()
    ) -> None:
        self._app = app
        self._keys = keys
        self._open = PROBES | open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for a caller, or answer 401 or 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope[_CALLER] = self._caller(scope)
        except LoraxError as error:
            await refusal(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        path = scope["path"]
        if scope["method"] == "GET" and path in self._open:
            return ANYBODY
        presented = keys_in(Headers(scope=scope).get)
        if path == METRICS_PATH:
            return _reader(self._keys.reader(presented))
        caller = self._keys.caller(presented)
        if caller.only_metrics:
            raise ForbiddenError(f"this key is for {METRICS_PATH} only")
        return caller


class MetricsGate:
    """In front of a listener that serves the metrics: asks for their key where there is one."""

    def __init__(self, app: ASGIApp, keys: KeyStore) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or answer 401 or 403."""
        try:
            if self._keys.has_metrics_key:
                _reader(self._keys.reader(keys_in(Headers(scope=scope).get)))
        except LoraxError as error:
            await refusal(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Return who makes a request."""
    return caller_in(request.scope)


def caller_in(scope: Scope) -> Caller:
    """Return who makes the call that a scope is of."""
    caller = scope.get(_CALLER, ANYBODY)
    assert isinstance(caller, Caller)
    return caller


class OneCaller:
    """Takes all who have come this far for one caller."""

    def __init__(self, app: ASGIApp, caller: Caller) -> None:
        self._app = app
        self._caller = caller

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for that caller."""
        scope[_CALLER] = self._caller
        await self._app(scope, receive, send)


def _reader(caller: Caller) -> Caller:
    if not (caller.may_read_metrics or caller.only_metrics):
        raise ForbiddenError(
            "this key does not open the metrics, which are of all tenants: --metrics-api-key gives "
            "one that does"
        )
    return caller
