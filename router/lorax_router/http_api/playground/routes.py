"""The routes of the playground: files that anybody may read, and what is live, for those who may ask.

The files hold nothing of the server and ask for no key, since a browser sends none when it opens a page.
All that the page shows it asks for by the routes that others use, with the key that is typed into it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lorax_router.http_api.auth import caller_of
from lorax_router.http_api.responses import json_response
from lorax_router.service.live import LiveView

PAGE_PATH = "/playground"
LIVE_PATH = "/playground/live"
# Nothing but files from here, and calls to here; no frame around it, nothing sent elsewhere.
_ALLOWED = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
POLICY = "; ".join(f"{name} {value}" for name, value in _ALLOWED.items())
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Another release may bring other files.
    "cache-control": "no-cache",
}
_KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_PAGE = "index.html"


class PlaygroundRoutes:
    """Handlers of ``/playground`` and what is below it; the files are read once."""

    def __init__(self, live: LiveView) -> None:
        self._live = live
        folder = Path(__file__).parent
        self._files = {
            path.name: (path.read_bytes(), _KINDS[path.suffix])
            for path in sorted(folder.iterdir())
            if path.suffix in _KINDS
        }

    @property
    def open_paths(self) -> frozenset[str]:
        """Paths of the files, which ask for no key."""
        return frozenset((PAGE_PATH, f"{PAGE_PATH}/", *map(_path_of, self._files)))

    def router(self) -> APIRouter:
        """The routes; they are the page's own, and not part of the description of the server."""
        router = APIRouter(include_in_schema=False)
        router.get(f"{PAGE_PATH}/")(self.to_page)
        router.get(LIVE_PATH)(self.live)
        for name in self._files:
            router.get(_path_of(name))(self._file(name))
        return router

    async def to_page(self) -> Response:
        """Lead to the page: what it links to is named from there."""
        return Response(status_code=308, headers={"location": "../playground", **HEADERS})

    async def live(self, request: Request) -> Response:
        """Answer with what the engine does now, as far as it is for the caller."""
        document = self._live.document(caller_of(request))
        return json_response(document, headers={**HEADERS, "cache-control": "no-store"})

    def _file(self, name: str) -> Callable[[], Awaitable[Response]]:
        content, kind = self._files[name]

        async def answer() -> Response:
            return Response(content, media_type=kind, headers=HEADERS)

        return answer


def _path_of(name: str) -> str:
    return PAGE_PATH if name == _PAGE else f"{PAGE_PATH}/{name}"
