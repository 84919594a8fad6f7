"""Who asks over gRPC: metadata in the place of headers, and TLS with HTTP's certificate."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import grpc

from lorax_contract.errors import ForbiddenError, LoraxError
from lorax_router.service.callers import ANYBODY, Caller
from lorax_router.service.keys.keyring import keys_in
from lorax_router.service.keys.store import KeyStore

logger = logging.getLogger(__name__)

# What tells orchestrators and balancers whether the server lives; asks for no key.
_PROBES = "/grpc.health.v1.Health/"
# Metadata that have to do with who calls.
KEY_NAMES = ("authorization", "x-api-key")


class CertificateSource(Protocol):
    """Where key and chain come from; the version tells whether they are others than before."""

    @property
    def version(self) -> int:
        """Changes with the files."""

    @property
    def pem(self) -> tuple[bytes, bytes]:
        """Key and chain; raises OSError."""


class Asker(Protocol):
    """Who makes a call."""

    @property
    def caller(self) -> Caller:
        """Whom the keys know."""

    @property
    def bearer_token(self) -> str | None:
        """The token for the hub that stands for the caller, a secret; None without one."""


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets calls of services through that ask no key themselves, but for the probes.

    Args:
        service: one that finds out who calls by itself.
    """

    def __init__(self, keys: KeyStore, service: str) -> None:
        self._keys = keys
        self._passed = (_PROBES, f"/{service}/")

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Answer a call without a key that is known, or pass it on."""
        method = handler_call_details.method or ""
        handler = await continuation(handler_call_details)
        if method.startswith(self._passed) or handler is None:
            return handler
        metadata: dict[str, str] = {
            name: value
            for name, value in handler_call_details.invocation_metadata or ()
            if isinstance(value, str)
        }
        try:
            caller_of(metadata.get, self._keys)
        except LoraxError as error:
            return _refusing(handler, error)
        return handler


def caller_of(get: Callable[[str], str | None], keys: KeyStore) -> Caller:
    """Return who makes a call; ``get`` looks its metadata up, which are as HTTP's headers are.

    Raises UnauthenticatedError, ForbiddenError.
    """
    if not keys.is_on:
        return ANYBODY
    caller = keys.caller(keys_in(get))
    if caller.only_metrics:
        raise ForbiddenError("this key is for the metrics only")
    return caller


def bearer_of(get: Callable[[str], str | None], caller: Caller) -> str | None:
    """Return the token for the hub that stands for a caller, a secret; None without one.

    It is that of the metadata's ``authorization``, unless the server has keys: then that is
    one of them, no source is told it, and the caller's tenant may have a token of its own.
    """
    if caller.has_key:
        return caller.api_token
    scheme, _, token = (get("authorization") or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _refusing(
    handler: grpc.RpcMethodHandler[Any, Any], error: LoraxError
) -> grpc.RpcMethodHandler[Any, Any]:
    """A handler of the same kind that refuses each call."""
    status = getattr(grpc.StatusCode, error.kind.grpc_status)

    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(status, error.public)

    async def refuse_stream(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(status, error.public)
        yield  # type: ignore[unreachable]  # what makes it a stream

    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = kinds[handler.request_streaming, handler.response_streaming]
    return make(refuse_stream if handler.response_streaming else refuse)


def credentials_of(source: CertificateSource) -> grpc.ServerCredentials:
    """Credentials that are read anew for connections that begin after the files changed."""
    told = source.version

    def configuration() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([source.pem])

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal told
        if source.version == told:
            return None
        told = source.version
        try:
            return configuration()
        except OSError as error:
            logger.error("gRPC keeps its certificate: %s", error)
            return None

    return grpc.dynamic_ssl_server_credentials(configuration(), fetch)  # type: ignore[arg-type]
