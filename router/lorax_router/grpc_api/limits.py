"""What clients of gRPC may cost, as HTTP's limits have it, and the library's options for that."""

from __future__ import annotations

from dataclasses import dataclass

# A connection without a call is closed, an old one is given up once its calls are done: clients
# make a new one by themselves.
_IDLE_MS = 5 * 60_000
_AGE_MS = 60 * 60_000
_AGE_GRACE_MS = 60 * 60_000
# Asks clients that say nothing whether they are there.
_KEEPALIVE_MS = 60_000
_KEEPALIVE_TIMEOUT_MS = 20_000
# A client that asks more often than that, and goes on after two warnings, is left.
_LEAST_PING_INTERVAL_MS = 10_000
_MAX_PING_STRIKES = 2
# Only messages that are not compressed: a small one can become any size.
_IDENTITY_ONLY = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """What clients may cost together and each; times are in seconds."""

    max_connections: int = 4096
    # Open calls of one connection: more than there are places for generations, so that who asks
    # too much hears of overload in words.
    max_streams: int = 512
    # Of the generation service, on all connections together.
    max_calls: int = 4096
    # Of one request.
    max_message_bytes: int = 2 << 20
    # To send a request, and to go on with reading what was written.
    client_timeout_s: float = 30.0
    # What counts as progress in reading, within `client_timeout_s`.
    read_bytes: int = 4_096
    # Written and not read: of one call, and of all.
    max_unread_bytes: int = 1 << 20
    max_all_unread_bytes: int = 128 << 20
    # Whether other processes that want that, too, may listen at the same port.
    shares_port: bool = False

    def server_options(self) -> list[tuple[str, int]]:
        """The same, as far as the library sees to it."""
        return [
            # Where nobody wants it, two listeners would share a port's calls without a word.
            ("grpc.so_reuseport", int(self.shares_port)),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.compression_enabled_algorithms_bitset", _IDENTITY_ONLY),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.max_concurrent_streams", self.max_streams),
            ("grpc.server_handshake_timeout_ms", round(self.client_timeout_s * 1000)),
            ("grpc.max_connection_idle_ms", _IDLE_MS),
            ("grpc.max_connection_age_ms", _AGE_MS),
            ("grpc.max_connection_age_grace_ms", _AGE_GRACE_MS),
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_INTERVAL_MS),
            ("grpc.http2.max_ping_strikes", _MAX_PING_STRIKES),
        ]
