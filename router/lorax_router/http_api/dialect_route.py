"""Routes whose errors are a dialect's own."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from lorax_contract.errors import LoraxError

logger = logging.getLogger(__name__)


class DialectRoute(APIRoute):
    """A route that answers what its handler raises."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with the mapper around it."""
        handle = super().get_route_handler()

        async def mapped(request: Request) -> Response:
            try:
                return await handle(request)
            except LoraxError as error:
                return self.response_of(error, request)
            except (ClientDisconnect, HTTPException):
                raise
            except Exception:
                logger.exception("unexpected error in %s", request.url.path)
                return self.response_of(LoraxError(public=""), request)

        return mapped

    @abstractmethod
    def response_of(self, error: LoraxError, request: Request) -> Response:
        """Return the response of an error that the handler of a request raised."""
