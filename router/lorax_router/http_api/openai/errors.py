"""Errors in OpenAI's envelope, with the statuses for which its SDKs raise the fitting exception.

Texts of the service name fields as the service knows them; a client reads them by the names that
it sent. A route of this dialect is made by ``OpenAIRoute``, which maps what its handler raises.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from lorax_contract.adapters import AdapterUnavailableError
from lorax_contract.errors import LoraxError, ModelNotFoundError
from lorax_router.http_api.dialect_route import DialectRoute
from lorax_router.http_api.field_names import in_words_of
from lorax_router.http_api.json_text import Json
from lorax_router.http_api.responses import (
    error_headers,
    json_response,
    new_request_id,
    public_error,
)

REQUEST_ID = "x-request-id"
# The service's names of fields that are called otherwise here.
FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "adapter_id": "model",
        "ignore_eos_token": "ignore_eos",
        "include_stop": "include_stop_str_in_output",
        "inputs": "prompt",
        "max_new_tokens": "max_tokens",
        "min_new_tokens": "min_tokens",
        "return_k_alternatives": "top_logprobs",
    }
)
# The same of bodies with texts that are not continued.
INPUT_FIELDS: Mapping[str, str] = MappingProxyType(
    {**FIELDS, "inputs": "input", "truncate": "truncate_prompt_tokens"}
)
# The same of bodies with messages.
CHAT_FIELDS: Mapping[str, str] = MappingProxyType(
    {**FIELDS, "inputs": "messages", "template_kwargs": "chat_template_kwargs"}
)
# The same where the newer name was sent.
NEWER_CHAT_FIELDS: Mapping[str, str] = MappingProxyType(
    {**CHAT_FIELDS, "max_new_tokens": "max_completion_tokens"}
)
# Statuses that say something else here: 422 is never a value's, and what fails in a shard is ours.
_STATUSES = {422: 400, 424: 500}
_INVALID, _LIMIT, _SERVER = "invalid_request_error", "rate_limit_error", "server_error"
# By status: type and code.
_KINDS: Mapping[int, tuple[str, str | None]] = {
    400: (_INVALID, None),
    401: (_INVALID, "invalid_api_key"),
    403: (_INVALID, "insufficient_permissions"),
    404: (_INVALID, "not_found"),
    405: (_INVALID, "method_not_allowed"),
    408: (_INVALID, "request_timeout"),
    409: (_INVALID, "conflict"),
    413: (_INVALID, "request_too_large"),
    415: (_INVALID, "unsupported_media_type"),
    429: (_LIMIT, "rate_limit_exceeded"),
    503: (_SERVER, "service_unavailable"),
    504: (_SERVER, "deadline_exceeded"),
}


def error_status(error: LoraxError) -> int:
    """Return the status of an error."""
    if isinstance(error, AdapterUnavailableError) and not error.reason.permanent:
        # A later try may succeed, which clients of this dialect take from a 503.
        return 503
    status = error.kind.http_status
    return _STATUSES.get(status, status)


def envelope(error: LoraxError, names: Mapping[str, str] = FIELDS) -> Json:
    """Return the body of an error; in a stream it is the data of the last event."""
    error = public_error(error)
    status = error_status(error)
    message, param = in_words_of(names, error, _message(error))
    if isinstance(error, ModelNotFoundError):
        return _document(message, _INVALID, "model", error.kind.error_type)
    kind, code = _KINDS.get(status, (_SERVER, error.kind.error_type))
    return _document(message, kind, param if status == 400 else None, code)


def openai_error_response(error: LoraxError, names: Mapping[str, str] = FIELDS) -> Response:
    """Return the response of an error."""
    retry_after_s: float | None = public_error(error).kind.retry_after_s
    if isinstance(error, AdapterUnavailableError) and not error.reason.permanent:
        retry_after_s = error.retry_after_s
    headers = error_headers(error)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, round(retry_after_s)))
    headers[REQUEST_ID] = new_request_id()
    return json_response(envelope(error, names), error_status(public_error(error)), headers)


def http_error_response(status: int, message: str, headers: dict[str, str]) -> Response:
    """Return the response of what routing found: no such path, no such method."""
    kind, code = _KINDS.get(status, (_INVALID, None))
    headers = {**headers, REQUEST_ID: new_request_id()}
    return json_response(_document(message, kind, None, code), status, headers)


class OpenAIRoute(DialectRoute):
    """A route whose errors are OpenAI's; ``names`` are the fields' names in its body."""

    names: ClassVar[Mapping[str, str]] = FIELDS

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, whose answers name themselves where this dialect's SDKs look."""
        handle = super().get_route_handler()

        async def named(request: Request) -> Response:
            response = await handle(request)
            response.headers.setdefault(REQUEST_ID, new_request_id())
            return response

        return named

    def response_of(self, error: LoraxError, request: Request) -> Response:
        """Return the response of an error that the handler of a request raised."""
        return openai_error_response(error, self.names)


class InputRoute(OpenAIRoute):
    """A route that makes something of texts and continues none."""

    names: ClassVar[Mapping[str, str]] = INPUT_FIELDS


def _document(message: str, kind: str, param: str | None, code: str | None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _message(error: LoraxError) -> str:
    """Return the text for the client; that a value is at fault is said by the status."""
    is_fault = error_status(error) == 400
    return error.public.removeprefix(f"{error.kind.prefix}: ") if is_fault else error.public
