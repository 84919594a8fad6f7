"""What goes to the client of one call: written as it reads, and bounded when it does not.

A generation never waits for its client: what it makes is put in a row here, so that its place is
free when its last token is there. A call that has too much in the row, or whose client makes no
progress for too long, is ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from lorax_router.grpc_api.errors import SlowReaderError
from lorax_router.grpc_api.limits import CallLimits


class MessageWriter(Protocol):
    """The library's side of a call, as far as answers go."""

    async def send_initial_metadata(self, initial_metadata: Sequence[tuple[str, str]]) -> None:
        """Send the head of the answer."""

    async def write(self, message: bytes) -> None:
        """Return when the client's window had room for the message."""


class ClientLeftError(Exception):
    """The call has ended on the client's side; nobody reads an answer."""


class UnreadBytes:
    """What all clients together have left to read, by connection.

    Args:
        most: bytes; beyond that the connection that has most of them is ended.
        cut: ends a connection, and with it all its calls.
    """

    def __init__(self, most: int, cut: Callable[[str], object]) -> None:
        self._most = most
        self._cut = cut
        self._by_peer: Counter[str] = Counter()
        # Those that end, until their calls are gone.
        self._ending: set[str] = set()
        self.total = 0

    def add(self, peer: str, number: int) -> None:
        """Take in what a call of a connection has to be read.

        Raises SlowReaderError, for a connection that ends.
        """
        self._by_peer[peer] += number
        self.total += number
        if self.total > self._most:
            self._make_room()
        if peer in self._ending:
            raise SlowReaderError("all clients together have too much left to read")

    def remove(self, peer: str, number: int) -> None:
        """So much was read, or will never be."""
        self.total -= number
        self._by_peer[peer] -= number
        if not self._by_peer[peer]:
            del self._by_peer[peer]
            self._ending.discard(peer)

    def _make_room(self) -> None:
        held = {peer: size for peer, size in self._by_peer.items() if peer not in self._ending}
        excess = sum(held.values()) - self._most
        for peer in sorted(held, key=held.__getitem__, reverse=True):
            if excess <= 0:
                break
            excess -= held[peer]
            self._ending.add(peer)
            self._cut(peer)


class ReplyQueue:
    """The messages of one call on their way to its client; one writer."""

    def __init__(
        self,
        writer: MessageWriter,
        peer: str,
        unread: UnreadBytes,
        limits: CallLimits,
        head: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._head = head
        self._has_begun = False
        self._writer = writer
        self._peer = peer
        self._all_unread = unread
        self._limits = limits
        self._messages: deque[bytes] = deque()
        self._unread = 0
        self._wake = asyncio.Event()
        self._is_closed = False

    @property
    def is_stuck(self) -> bool:
        """Whether something is being written that the client has no room for."""
        return self._unread > sum(map(len, self._messages))

    def put(self, message: bytes) -> None:
        """Have a message sent; raises SlowReaderError when too many wait."""
        self._messages.append(message)
        self._unread += len(message)
        self._all_unread.add(self._peer, len(message))
        self._wake.set()
        # A single large message may be waited for, however large it is.
        if self._unread > self._limits.max_unread_bytes and self._unread > len(message):
            raise SlowReaderError("the client reads too slowly; it had too much left to read")

    def close(self) -> None:
        """No more messages will come: ``write_all`` returns when the rest is written."""
        self._is_closed = True
        self._wake.set()

    async def write_all(self) -> None:
        """Write what comes until closed; raises SlowReaderError, ClientLeftError."""
        while not (self._is_closed and not self._messages):
            if not self._messages:
                self._wake.clear()
                await self._wake.wait()
                continue
            if not self._has_begun:
                # Apart from the first message: while that one is stuck, the library could send no
                # status, which has the head with it if there was none.
                self._has_begun = True
                await _sent(self._writer.send_initial_metadata(self._head))
            try:
                async with asyncio.timeout(self._limits.client_timeout_s):
                    await self._write_some()
            except TimeoutError:
                raise SlowReaderError("the client does not read") from None

    async def _write_some(self) -> None:
        """Write as much as counts as progress, or all there is."""
        written = 0
        while self._messages and written < self._limits.read_bytes:
            message = self._messages.popleft()
            await _sent(self._writer.write(message))
            written += len(message)
            self._read(len(message))

    def forget(self) -> None:
        """The call is over: nothing of it is left to be read."""
        self._messages.clear()
        self._read(self._unread)

    def drop_waiting(self) -> None:
        """Nothing that waits will be written; what is being written may be for long."""
        dropped = sum(map(len, self._messages))
        self._messages.clear()
        self._read(dropped)

    def _read(self, number: int) -> None:
        if number:
            self._unread -= number
            self._all_unread.remove(self._peer, number)


async def _sent(sending: Awaitable[None]) -> None:
    """Wait for a part of an answer to be sent; raises ClientLeftError."""
    try:
        await sending
    except Exception as error:  # the library has no public name for what it raises
        raise ClientLeftError from error
