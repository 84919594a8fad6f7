"""Errors of calls that reach no route, in the envelope that the caller's SDK reads."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from lorax_contract.errors import LoraxError
from lorax_router.http_api.anthropic.errors import anthropic_error_response
from lorax_router.http_api.openai.errors import openai_error_response
from lorax_router.http_api.responses import error_response

# With it, paths that both dialects have are Anthropic's.
ANTHROPIC_VERSION = "anthropic-version"
_ANTHROPIC = "/v1/messages"
_OF_BOTH = "/v1/models"
# Beside these, what begins with /v1/ is OpenAI's.
_LORAX = "/v1/adapters"


def refusal(scope: Scope, error: LoraxError) -> Response:
    """Return the response of an error by what was asked for."""
    if speaks_anthropic(scope):
        return anthropic_error_response(error)
    return openai_error_response(error) if speaks_openai(scope) else error_response(error)


def speaks_anthropic(scope: Scope) -> bool:
    """Whether a call is one of Anthropic's dialect."""
    path = scope["path"]
    if _is_below(path, _OF_BOTH):
        return ANTHROPIC_VERSION in Headers(scope=scope)
    return _is_below(path, _ANTHROPIC)


def speaks_openai(scope: Scope) -> bool:
    """Whether a call that is none of Anthropic's dialect is one of OpenAI's."""
    path: str = scope["path"]
    return path.startswith("/v1/") and not _is_below(path, _LORAX)


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")
