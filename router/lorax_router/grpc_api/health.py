# ruff: noqa: N802 - the methods bear the names that the proto gives them.
"""The standard health service, for many watchers of whom some do not read."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

_Context = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One status for some names. The library's own lets a watcher that does not read hold up all.

    Args:
        names: services whose health it is.
        max_watchers: those that come when there are so many are refused.
    """

    def __init__(self, names: frozenset[str], max_watchers: int = 1024) -> None:
        self._names = names
        self._max_watchers = max_watchers
        self._num_watchers = 0
        self._status = NOT_SERVING
        self._is_closed = False
        # Set when the status changes; another one takes its place then.
        self._change = asyncio.Event()

    def set(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        """Have this status from now on; after ``close`` it stays what it is."""
        if status != self._status and not self._is_closed:
            self._status = status
            self._change.set()
            self._change = asyncio.Event()

    def close(self) -> None:
        """Serve nothing any more, for good."""
        self.set(NOT_SERVING)
        self._is_closed = True

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """Answer with the status of a service."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:
        """Send the status of a service, and again whenever it changes."""
        if self._num_watchers >= self._max_watchers:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "there are too many watchers")
        self._num_watchers += 1
        try:
            while True:
                change = self._change
                status = self._status if request.service in self._names else _UNKNOWN
                await context.write(health_pb2.HealthCheckResponse(status=status))
                await change.wait()
        finally:
            self._num_watchers -= 1
