"""On what terms a request asks for its turn, as its head says it: the same for all dialects."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request

from lorax_contract.errors import BadRequestError
from lorax_router.service.requests import GenerateParameters

PRIORITY = "x-priority"
CACHE_SALT = "x-cache-salt"


def with_terms(request: Request, parameters: GenerateParameters) -> GenerateParameters:
    """Return parameters with the terms of the head, where the body has none of its own.

    Raises BadRequestError.
    """
    priority, salt = parameters.priority, parameters.cache_salt
    if priority is None and (text := request.headers.get(PRIORITY)) is not None:
        priority = _integer(text)
    if salt is None:
        salt = request.headers.get(CACHE_SALT)
    if (priority, salt) == (parameters.priority, parameters.cache_salt):
        return parameters
    return replace(parameters, priority=priority, cache_salt=salt)


def _integer(text: str) -> int:
    # Longer ones are no numbers that anything here counts with.
    if len(text) <= 20 and text.strip().lstrip("+-").isdecimal():
        try:
            return int(text)
        except ValueError:
            pass
    raise BadRequestError(f"the header {PRIORITY} must be a whole number; a smaller one goes first")
