"""Shows errors as gRPC statuses: in words, and without what only the log should hold."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from lorax_contract.errors import BadRequestError, ErrorKind, LoraxError, StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_proto import transport

if TYPE_CHECKING:
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # generic in its stub only
    _ServerInterceptor = grpc.aio.ServerInterceptor

logger = logging.getLogger(__name__)

_INTERNAL_TEXT = "the shard failed inside; its log says why"


class NotServedError(LoraxError):
    """The call is known, but this shard does not serve it."""

    kind = ErrorKind(501, "UNIMPLEMENTED", "not_served")


class ErrorInterceptor(_ServerInterceptor):
    """Maps what the handlers of one service raise to gRPC statuses."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of a unary call of the service."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.unary_unary is None or not method.startswith(self._prefix):
            return handler
        return grpc.unary_unary_rpc_method_handler(
            _mapped(handler.unary_unary, method),
            request_deserializer=_readable(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Return the status and the text that a caller is shown for an error."""
    if isinstance(error, StartupError) and error.exit_code is ExitCode.OUT_OF_MEMORY:
        return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    if isinstance(error, LoraxError):
        return transport.status_of(error), str(error)
    return grpc.StatusCode.INTERNAL, _INTERNAL_TEXT


def _readable(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return what reads a request; None for bytes that are none, which grpc would call UNKNOWN."""

    def request_of(raw: bytes) -> Any:
        try:
            return read(raw)
        except DecodeError:
            return None

    return request_of


def _mapped(handler: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            if request is None:
                raise BadRequestError("the request is not the message that this method takes")
            return await handler(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            status, text = status_of(error)
            if isinstance(error, LoraxError):
                logger.warning("%s refused: %s", method, error)
            else:
                logger.exception("%s failed", method)
        return await context.abort(status, text)

    return call
