"""What both ends of a channel between router and shard agree on: options and statuses.

An error crosses the wire as its kind's gRPC status and its text, and comes back as::

    FAILED_PRECONDITION                         StaleEpochError
    UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED   ShardUnavailableError
    any other                                   ShardError

What went wrong with one request or one adapter is no error of a call: replies have fields for it.
"""

from __future__ import annotations

import grpc

from lorax_contract.errors import (
    LoraxError,
    ShardError,
    ShardUnavailableError,
    StaleEpochError,
)

KEEPALIVE_TIME_MS = 30_000

_UNLIMITED = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]

CLIENT_OPTIONS: list[tuple[str, int]] = [
    *_UNLIMITED,
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A shard may stand still while nothing is asked of it.
    ("grpc.keepalive_permit_without_calls", 1),
    # A step may run for minutes without a byte: pings must not run out meanwhile.
    ("grpc.http2.max_pings_without_data", 0),
    # Quick reconnects: a shard is on this host or beside it.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A proxy named in the environment is for the internet, not for shards.
    ("grpc.enable_http_proxy", 0),
    # Clients of one address in one process must not share a connection.
    ("grpc.use_local_subchannel_pool", 1),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_UNLIMITED,
    # Accept the pings of CLIENT_OPTIONS; the default takes one in five minutes.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 3),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two servers on one port is a mistake to report, not a load balancer.
    ("grpc.so_reuseport", 0),
]

_GONE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


def status_of(error: BaseException) -> grpc.StatusCode:
    """Return the status with which a shard answers when ``error`` ended a call."""
    if isinstance(error, LoraxError):
        return grpc.StatusCode[error.kind.grpc_status]
    return grpc.StatusCode.INTERNAL


def error_of(status: grpc.StatusCode, details: str | None, who: str) -> ShardError:
    """Return the error that a failed call stands for; its text begins with ``who``."""
    text = f"{who}: {details or status.name}"
    if status is grpc.StatusCode.FAILED_PRECONDITION:
        return StaleEpochError(text)
    if status in _GONE:
        return ShardUnavailableError(f"{text} ({status.name})")
    return ShardError(text)
