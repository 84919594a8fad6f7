"""Connections are accepted in one place and served in another; none is lost while nobody can have it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_router.fronts.connections import HandedConnections
from lorax_router.fronts.handing import Acceptor, hand_over, handed_over
from lorax_router.http_api.connection import ConnectionLimits
from lorax_router.http_api.server import HttpServer


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def connected(listener: socket.socket) -> socket.socket:
    client = socket.create_connection(listener.getsockname())
    client.setblocking(False)
    return client


def test_a_connection_arrives_as_it_was():
    ours, theirs = socket.socketpair()
    with ours, theirs, listening() as listener:
        theirs.setblocking(False)
        assert handed_over(theirs) == []
        clients = [connected(listener) for _ in range(20)]
        for _ in clients:
            connection, _ = listener.accept()
            assert hand_over(ours, connection)
            assert connection.fileno() == -1
        found = handed_over(theirs)
        assert [each.getpeername() for each in found] == [each.getsockname() for each in clients]
        for each in (*clients, *found):
            each.close()


def test_nothing_is_given_to_a_process_that_is_gone():
    ours, theirs = socket.socketpair()
    with ours, listening() as listener:
        theirs.close()
        with connected(listener), listener.accept()[0] as connection:
            assert not hand_over(ours, connection)
            assert connection.fileno() != -1


@in_loop
async def test_whoever_comes_while_nobody_serves_waits():
    given: list[socket.socket] = []
    is_open = False

    def give(connection: socket.socket) -> bool:
        if is_open:
            given.append(connection)
        return is_open

    with listening() as listener:
        acceptor = Acceptor(listener, give)
        acceptor.start()
        clients = [connected(listener) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert given == []
        # Nobody has to say so.
        is_open = True
        await until(lambda: len(given) == 3)
        assert [each.getpeername() for each in given] == [each.getsockname() for each in clients]
        acceptor.stop()
        assert listener.fileno() == -1
        # A stopped one does not begin again.
        acceptor.start()
        for each in (*clients, *given):
            each.close()


@in_loop
async def test_without_files_it_tries_again():
    given: list[socket.socket] = []

    class Poor(socket.socket):
        num_tries = 0

        def accept(self):  # type: ignore[no-untyped-def]
            self.num_tries += 1
            if self.num_tries < 2:
                raise OSError(errno.EMFILE, "no more files")
            return super().accept()

    with Poor() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        acceptor = Acceptor(listener, lambda connection: not given.append(connection))
        acceptor.start()
        with connected(listener):
            await until(lambda: given)
        acceptor.stop()
        given[0].close()


@in_loop
async def test_a_connection_that_was_given_is_served_and_its_end_told():
    ended: list[int] = []

    async def app(scope, receive, send):  # type: ignore[no-untyped-def]
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    server = HttpServer(app, connections=HandedConnections(ConnectionLimits(), ended.append))
    running = asyncio.create_task(server.run())
    await server.wait_started()
    loop = asyncio.get_running_loop()
    with listening() as listener:
        for number in (1, 2):
            with connected(listener) as client:
                connection, _ = listener.accept()
                assert await server.adopt(connection)
                await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                assert (await loop.sock_recv(client, 100)).startswith(b"HTTP/1.1 204")
                assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            await until(lambda number=number: ended == [*range(1, number + 1)])
    server.stop()
    await running
