"""Routes whose errors are a dialect's own, in the names that its clients send.

Texts of the service name fields as the service knows them; a client reads them by its own names.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from lorax_contract.errors import LoraxError

logger = logging.getLogger(__name__)

_FIELD = re.compile(r"`([a-z]\w*)((?:\.\w+)*)`")


class DialectRoute(APIRoute):
    """A route that answers what its handler raises."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler with the mapper around it."""
        handle = super().get_route_handler()

        async def mapped(request: Request) -> Response:
            try:
                return await handle(request)
            except LoraxError as error:
                return self.response_of(error)
            except (ClientDisconnect, HTTPException):
                raise
            except Exception:
                logger.exception("unexpected error in %s", request.url.path)
                return self.response_of(LoraxError(public=""))

        return mapped

    @abstractmethod
    def response_of(self, error: LoraxError) -> Response:
        """Return the response of an error that the handler raised."""


def in_words_of(names: Mapping[str, str], text: str) -> tuple[str, str | None]:
    """Return a text with its fields renamed, and the first of them."""
    fields: list[str] = []

    def renamed(match: re.Match[str]) -> str:
        fields.append(names.get(match[1], match[1]) + match[2])
        return f"`{fields[-1]}`"

    return _FIELD.sub(renamed, text), fields[0] if fields else None
