"""Errors of calls that reach no route, in the envelope that the caller's SDK reads."""

from __future__ import annotations

from starlette.responses import Response

from lorax_contract.errors import LoraxError
from lorax_router.http_api.openai.errors import openai_error_response
from lorax_router.http_api.responses import error_headers, error_response, json_response

# Beside these, what begins with /v1/ is OpenAI's.
_LORAX = "/v1/adapters"
_ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


def refusal(path: str, error: LoraxError) -> Response:
    """Return the response of an error by the path that was asked for."""
    if _is_below(path, _ANTHROPIC):
        status = error.kind.http_status
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        document = {"type": "error", "error": {"type": kind, "message": error.public}}
        return json_response(document, status, error_headers(error))
    if path.startswith("/v1/") and not _is_below(path, _LORAX):
        return openai_error_response(error)
    return error_response(error)


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}/")
