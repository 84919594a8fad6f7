"""Errors of calls that reach no route, in the envelope that the caller's SDK reads."""

from __future__ import annotations

from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_router.http_api.anthropic.errors import anthropic_error_response
from lorax_router.http_api.openai.errors import openai_error_response
from lorax_router.http_api.responses import error_response

# Beside these, what begins with /v1/ is OpenAI's.
_LORAX = "/v1/adapters"
_ANTHROPIC = "/v1/messages"


def refusal(path: str, error: LoraxError) -> Response:
    """Return the response of an error by the path that was asked for."""
    if is_anthropic(path):
        return anthropic_error_response(error)
    if path.startswith("/v1/") and not _is_below(path, _LORAX):
        return openai_error_response(error)
    return error_response(error)


def is_anthropic(path: str) -> bool:
    """Whether a path is one of Anthropic's dialect."""
    return _is_below(path, _ANTHROPIC)


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")
