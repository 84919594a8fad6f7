"""Who may manage the server: somebody on this machine, and no page in a browser.

No key is asked for here, so where a call comes from has to do. The unix socket is this user's alone. The
port is on the loopback interface, where browsers and proxies are, too: a page's call names its
origin, or a host that only its own name server takes for this machine, and a proxy says that it
passes something on.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_contract.errors import ForbiddenError
from lorax_router.http_api.responses import error_response

_PROXIES_HEADERS = ("forwarded", "via", "x-real-ip")


class AdminGuard:
    """Refuses what a browser or a proxy passed on; ``on_unix``: whatever the host is called."""

    def __init__(self, app: ASGIApp, *, on_unix: bool) -> None:
        self._app = app
        self._on_unix = on_unix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, or answer 403."""
        if (fault := self._fault_of(Headers(scope=scope))) is not None:
            await error_response(ForbiddenError(fault))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _fault_of(self, headers: Headers) -> str | None:
        if "origin" in headers:
            return "this listener is not for pages in a browser: a call with an Origin is refused"
        for name in headers:
            if name in _PROXIES_HEADERS or name.startswith("x-forwarded-"):
                return f"this listener is not for proxies: a call with {name} is refused"
        if not self._on_unix and not is_loopback(headers.get("host", "")):
            return "this listener is for this machine only: the Host must be localhost or 127.0.0.1"
        return None


def is_loopback(host: str) -> bool:
    """Whether a Host header names this machine, by name or by an address of the loopback."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
