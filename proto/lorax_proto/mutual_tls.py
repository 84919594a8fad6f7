"""TCP between router and shards: each end shows a certificate of one authority, or is refused.

Unix sockets need none: they are the user's alone.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_proto.transport import CLIENT_OPTIONS

AUTHORITY, CHAIN, KEY = "ca.pem", "cert.pem", "key.pem"


@dataclass(frozen=True, slots=True)
class MutualTls:
    """What one end shows, and whom it believes."""

    authority: bytes
    chain: bytes
    key: bytes

    @classmethod
    def read(cls, folder: str | None) -> MutualTls | None:
        """Read ca.pem, cert.pem and key.pem of a folder; None of none.

        Raises StartupError (BAD_CONFIG) when they cannot be used, in words.
        """
        if folder is None:
            return None
        context_in(folder, "shard_tls_dir", context_of_client)
        return cls(*(Path(folder, name).read_bytes() for name in (AUTHORITY, CHAIN, KEY)))

    @property
    def of_server(self) -> grpc.ServerCredentials:
        """Credentials of the shard's end; who shows no certificate gets no connection."""
        return grpc.ssl_server_credentials(
            [(self.key, self.chain)], root_certificates=self.authority, require_client_auth=True
        )

    @property
    def of_client(self) -> grpc.ChannelCredentials:
        """Credentials of the router's end; the shard's certificate must name its address."""
        return grpc.ssl_channel_credentials(self.authority, self.key, self.chain)


def context_of_server(folder: Path) -> ssl.SSLContext:
    """Return TLS for other streams than gRPC's: who shows no certificate gets no connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, folder)


def context_of_client(folder: Path) -> ssl.SSLContext:
    """Return the other end; the server's certificate must name its address."""
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), folder)


def context_in(
    folder: str | None, name: str, make: Callable[[Path], ssl.SSLContext]
) -> ssl.SSLContext | None:
    """Return the TLS of a folder that a setting names; None of none.

    Raises StartupError (BAD_CONFIG) when it cannot be used, in words.
    """
    if folder is None:
        return None
    try:
        return make(Path(folder))
    except (OSError, ValueError) as error:
        raise StartupError(
            f"{name}: {folder} must hold {AUTHORITY}, {CHAIN} and {KEY} in PEM form, the key "
            f"without a password: {error}",
            ExitCode.BAD_CONFIG,
        ) from error


def _loaded(context: ssl.SSLContext, folder: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(folder / AUTHORITY)
    # No password is asked for at a terminal: a key that needs one cannot be used.
    context.load_cert_chain(folder / CHAIN, folder / KEY, password=lambda: b"")
    return context


def channel_to(uri: str, tls: MutualTls | None) -> grpc.aio.Channel:
    """Open a channel to a shard."""
    if tls is None or uri.startswith("unix:"):
        return grpc.aio.insecure_channel(uri, options=CLIENT_OPTIONS)
    return grpc.aio.secure_channel(uri, tls.of_client, options=CLIENT_OPTIONS)


def blocking_channel_to(uri: str, tls: MutualTls | None) -> grpc.Channel:
    """Open a channel to a shard for threads, which wait for its answers."""
    if tls is None or uri.startswith("unix:"):
        return grpc.insecure_channel(uri, options=CLIENT_OPTIONS)
    return grpc.secure_channel(uri, tls.of_client, options=CLIENT_OPTIONS)


def listen_at(uri: str, server: grpc.aio.Server, tls: MutualTls | None) -> int:
    """Bind a shard's address and return its port; RuntimeError: it cannot be had."""
    if tls is None or uri.startswith("unix:"):
        return server.add_insecure_port(uri)
    return server.add_secure_port(uri, tls.of_server)
