"""Errors as Anthropic's SDKs read them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.adapters import AdapterUnavailableError
from lorax_contract.errors import LoraxError, OverloadedError, ShuttingDownError
from lorax_router.http_api.dialect_route import DialectRoute
from lorax_router.http_api.field_names import in_words_of
from lorax_router.http_api.json_text import Json
from lorax_router.http_api.responses import (
    error_headers,
    json_response,
    new_request_id,
    public_error,
)

# The service's names of fields that are called otherwise here.
FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "adapter_id": "model",
        "inputs": "messages",
        "max_new_tokens": "max_tokens",
        "stop": "stop_sequences",
    }
)
# Their SDKs raise an error of its own for it, and try again.
_OVERLOADED = 529
# Statuses that say something else here.
_STATUSES = {422: 400, 424: 500}
_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    _OVERLOADED: "overloaded_error",
}


def anthropic_status(error: LoraxError) -> int:
    """Return the status of an error."""
    if isinstance(error, OverloadedError | ShuttingDownError):
        return _OVERLOADED
    if isinstance(error, AdapterUnavailableError) and not error.reason.permanent:
        # A later try may succeed.
        return 503
    status = error.kind.http_status
    return _STATUSES.get(status, status)


def anthropic_error_document(error: LoraxError, request_id: str) -> Json:
    """Return the body of an error; in a stream it is the data of the last event."""
    error = public_error(error)
    status, message = anthropic_status(error), error.public
    if status == 400:
        message = message.removeprefix(f"{error.kind.prefix}: ")
    return _document(status, in_words_of(FIELDS, error, message)[0], request_id)


def anthropic_error_response(error: LoraxError, request_id: str | None = None) -> Response:
    """Return the response of an error."""
    request_id = request_id or new_request_id()
    shown = public_error(error)
    headers = {**error_headers(shown), "request-id": request_id}
    if isinstance(error, AdapterUnavailableError) and error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after_s)))
    document = anthropic_error_document(shown, request_id)
    return json_response(document, anthropic_status(shown), headers)


def routing_error_response(status: int, message: str, headers: dict[str, str]) -> Response:
    """Return the response of what routing found: no such path, no such method."""
    request_id = new_request_id()
    document = _document(status, message, request_id)
    return json_response(document, status, {**headers, "request-id": request_id})


class AnthropicRoute(DialectRoute):
    """A route whose errors are Anthropic's."""

    def response_of(self, error: LoraxError, request: Request) -> Response:
        """Return the response of an error that the handler of a request raised."""
        return anthropic_error_response(error)


def _document(status: int, message: str, request_id: str) -> Json:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": message},
        "request_id": request_id,
    }
