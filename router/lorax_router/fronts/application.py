"""The application of a front: it generates by itself, as far as words go; the core answers the rest."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class FrontApplication:
    """Answers calls that generate itself, and has the core answer all others.

    Args:
        own: the application of what generates.
        others: what answers everything else, so that it says the same wherever it is asked.
        paths: those on which a POST generates.
    """

    def __init__(self, own: ASGIApp, others: ASGIApp, paths: frozenset[str]) -> None:
        self._own = own
        self._others = others
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call."""
        is_own = scope["method"] == "POST" and scope["path"] in self._paths
        await (self._own if is_own else self._others)(scope, receive, send)
