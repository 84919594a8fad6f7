"""Ends a connection of the gRPC listener: the library cannot, so its socket is shut down."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from urllib.parse import unquote

logger = logging.getLogger(__name__)

# The open files of this process.
_FILES = "/dev/fd"

_Address = tuple[str, int]


def cut(peer: str) -> bool:
    """End the connection to a peer, by the library's name for it; False if there is none."""
    wanted = _address_of(peer)
    if wanted is None:
        return False
    for name in os.listdir(_FILES):
        # A second name for the file, so that nothing of the library's is closed here.
        with (
            contextlib.suppress(OSError),
            socket.socket(fileno=os.dup(int(name))) as connection,
        ):
            if _remote(connection) == wanted:
                connection.shutdown(socket.SHUT_RDWR)
                logger.info("a gRPC connection is cut: its client reads too little")
                return True
    return False


def _address_of(peer: str) -> _Address | None:
    """Read what the library calls ``ipv4:127.0.0.1:5000`` or ``ipv6:%5B::1%5D:5000``."""
    family, _, rest = peer.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    return _plain(host.strip("[]")), int(port)


def _remote(connection: socket.socket) -> _Address | None:
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    host, port = connection.getpeername()[:2]
    return _plain(host), port


def _plain(host: str) -> str:
    """An address in one form, whichever kind of socket it came through."""
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
