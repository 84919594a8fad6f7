"""An ingress as ``lorax-ingress``, but one that sends each request to any replica."""

from __future__ import annotations

from collections.abc import Callable

from lorax_ingress import app
from lorax_ingress.cli import main
from lorax_ingress.routing.router import AffineRouter
from lorax_ingress.routing.values import RouteDecision, RouteReason, RouteRequest, RoutingSettings


class RandomRouter(AffineRouter):
    """Knows replicas as ours does, and asks nothing of it but who takes requests."""

    def __init__(self, draw: Callable[[int], int]) -> None:
        super().__init__(draw, RoutingSettings(preloads=False))
        self._any = draw

    def route(self, request: RouteRequest, now: float) -> RouteDecision | None:
        """Return any replica that takes requests."""
        names = sorted(self.fleet.open)
        if not names:
            return None
        return RouteDecision(names[self._any(len(names))], RouteReason.LOAD)


if __name__ == "__main__":
    app.AffineRouter = RandomRouter  # type: ignore[attr-defined, misc]
    main()
