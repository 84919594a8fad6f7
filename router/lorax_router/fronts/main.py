"""The process of a front: HTTP, keys, bodies, dialects and events; the core does the rest."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from functools import partial

from lorax_contract import logs
from lorax_contract.exit_codes import ExitCode
from lorax_contract.process import importing, spare_garbage_collector, watch_lifeline

with importing():
    import uvloop

    from lorax_router.fronts.connections import HandedConnections
    from lorax_router.fronts.front import Front
    from lorax_router.fronts.handing import handed_over
    from lorax_router.fronts.link import Link
    from lorax_router.fronts.messages import NoteEnded, NoteReady, encode
    from lorax_router.fronts.plan import FrontPlan
    from lorax_router.http_api.connection import ConnectionLimits
    from lorax_router.http_api.server import HttpServer
    from lorax_router.service.keys.configured import key_store
    from lorax_router.tls import TlsIdentity

logger = logging.getLogger(__name__)

# Requests that the core has not read; it reads all the while, and does not wait for a front.
_MAX_UNSENT_BYTES = 1 << 30


async def serve(plan: FrontPlan) -> None:
    """Serve the connections that the core hands over until it says that none come any more."""
    config = plan.config
    keys, tls = key_store(config), TlsIdentity.of(config)
    front = Front(plan, keys)
    end = socket.socket(fileno=plan.link_fd)
    link = front.link = await Link.over(
        end, front.take, partial(_end_without_core, front), _MAX_UNSENT_BYTES
    )
    limits = ConnectionLimits(
        max_connections=plan.max_connections, client_timeout_s=config.client_timeout_s
    )
    connections = HandedConnections(limits, lambda count: link.send(encode(NoteEnded(count))))
    server = HttpServer(
        front.app, connections=connections, tls=None if tls is None else tls.context
    )
    front.on_stop = server.stop
    if front.is_stopping:
        server.stop()
    async with asyncio.TaskGroup() as group:
        followers = [group.create_task(keys.follow())]
        if tls is not None:
            followers.append(group.create_task(tls.follow()))
        running = group.create_task(server.run())
        await server.wait_started()
        receiver = _receive(plan.connections_fd, server, connections, group)
        spare_garbage_collector()
        link.send(encode(NoteReady()))
        await running
        asyncio.get_running_loop().remove_reader(receiver.fileno())
        for each in followers:
            each.cancel()


def _receive(
    descriptor: int, server: HttpServer, connections: HandedConnections, group: asyncio.TaskGroup
) -> socket.socket:
    """Take connections as the core hands them over."""
    receiver = socket.socket(fileno=descriptor)
    receiver.setblocking(False)

    async def adopt(connection: socket.socket) -> None:
        if not await server.adopt(connection):
            connections.end_one()

    def take() -> None:
        for each in handed_over(receiver):
            group.create_task(adopt(each))

    asyncio.get_running_loop().add_reader(receiver.fileno(), take)
    return receiver


def _end_without_core(front: Front) -> None:
    """Without the core there is nothing to wait for."""
    if not front.is_stopping:
        logger.error("the router is gone")
    _leave(ExitCode.PARENT_GONE)


def _leave(code: ExitCode) -> None:
    logging.shutdown()
    os._exit(int(code))


def main() -> None:
    """Run a front by the plan on standard input."""
    line = sys.stdin.buffer.readline()
    if not line:
        _leave(ExitCode.PARENT_GONE)
    plan = FrontPlan.from_line(line)
    bound = {"process": "front", "front": plan.number}
    logs.configure(plan.config.log_level, bound=bound)
    # It ends with the router, which has its reasons and knows what still runs.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    watch_lifeline(lambda: _leave(ExitCode.PARENT_GONE))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(plan))
    _leave(ExitCode.OK)


if __name__ == "__main__":
    main()
