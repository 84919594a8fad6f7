"""Connections of clients: accepted by the core, handed to the front that has fewest of them.

A front that accepted by itself would take all that wait when it is the first to look, and keep them
for as long as their streams last. So they are even, whatever their streams last, and none waits for
a front that is gone.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from lorax_router.http_api.listeners import refuse_new

logger = logging.getLogger(__name__)

# Of those that wait, at most so many are taken in a row: other work has its turn, too.
_AT_ONCE = 128
# Seconds until another try: where the system has no more files, and where nobody takes what there is.
_POOR_S = 0.5
_BUSY_S = 0.05
_FILES_AT_ONCE = 16
_SPARE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Takes connections from a socket that listens, and gives each away.

    Args:
        listener: bound and listening; closed by ``stop``.
        give: takes a connection, which it owns then; False: nobody can have it now.
    """

    def __init__(self, listener: socket.socket, give: Callable[[socket.socket], bool]) -> None:
        self._listener = listener
        self._give = give
        # One that nobody could have.
        self._held: socket.socket | None = None
        self._is_stopped = False
        self._is_reading = False

    def start(self) -> None:
        """Begin to accept; those who came before have waited."""
        if self._is_stopped or self._is_reading:
            return
        if self._held is not None and not self._give(self._held):
            self._try_again(_BUSY_S)
            return
        self._held = None
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)
        self._is_reading = True

    def stop(self) -> None:
        """Accept those who are connected already, and no more, for good."""
        self._is_stopped = True
        if self._is_reading:
            refuse_new(self._listener)
            self._accept()
        self._pause()
        self._listener.close()
        if self._held is not None:
            self._held.close()
            self._held = None

    def _try_again(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self.start)

    def _pause(self) -> None:
        if self._is_reading:
            self._is_reading = False
            asyncio.get_running_loop().remove_reader(self._listener.fileno())

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _SPARE:
                    raise
                logger.error("no connection can be accepted: %s", error)
                self._pause()
                self._try_again(_POOR_S)
                return
            if not self._give(connection):
                self._held = connection
                self._pause()
                self._try_again(_BUSY_S)
                return


def hand_over(through: socket.socket, connection: socket.socket) -> bool:
    """Give a connection to the process at the other end; False: it takes none now."""
    try:
        socket.send_fds(through, [b"c"], [connection.fileno()])
    except OSError:
        return False
    connection.close()
    return True


def handed_over(through: socket.socket) -> list[socket.socket]:
    """Return the connections that were given to this process and not taken yet."""
    found: list[socket.socket] = []
    while True:
        try:
            data, files, _, _ = socket.recv_fds(through, _FILES_AT_ONCE, _FILES_AT_ONCE)
        except (BlockingIOError, InterruptedError):
            return found
        found += [socket.socket(fileno=each) for each in files]
        if not data:
            return found
