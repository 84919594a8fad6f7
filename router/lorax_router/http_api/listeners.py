"""The sockets that HTTP is served on."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator

# What the system keeps for a client that does not read, in bytes.
_SEND_BYTES = 256 << 10
# Nobody but the user who runs the server.
_PRIVATE = 0o177
# Linux's number, which Python has no name for, and the one instruction of a filter that takes nothing.
_SO_ATTACH_FILTER = 26
_DROP_ALL = (0x06, 0, 0, 0)


def bind(hostname: str, port: int, *, shares_port: bool = False) -> socket.socket:
    """Return a TCP socket bound to an address, not yet listening; raises OSError.

    ``shares_port``: other processes of this user that share it, too, may listen there as well; the
    system gives each connection to one of those that listen.
    """
    address = socket.getaddrinfo(hostname, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    family, kind, protocol, _, where = address
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _prepare(listener)
        listener.bind(where)
    except OSError:
        listener.close()
        raise
    listener.set_inheritable(False)
    return listener


def _prepare(listener: socket.socket) -> None:
    """Set what connections inherit from their listener.

    The system notices clients that vanished, and keeps little for those that do not read: by
    itself it would keep megabytes for each.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if (option := getattr(socket, name, None)) is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


def refuse_new(listener: socket.socket) -> None:
    """Let nobody connect from now on; who has is still to be accepted.

    A listener that closes resets those whom nobody has accepted, and they cannot know whether what
    they asked was done. So it hears no packet any more: who comes now tries again, and finds the port
    closed. Elsewhere than on Linux it does nothing.
    """
    if sys.platform != "linux" or listener.family not in (socket.AF_INET, socket.AF_INET6):
        return
    program = ctypes.create_string_buffer(struct.pack("HBBI", *_DROP_ALL))
    filter_ = struct.pack("HP", 1, ctypes.addressof(program))
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    """The address of a bound socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextlib.contextmanager
def bind_unix(path: str) -> Iterator[socket.socket]:
    """Bind a unix socket that this user alone can reach, and remove it at the end.

    What a server that is gone left at ``path`` is replaced; raises OSError.
    """
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(_PRIVATE)
    try:
        _remove_stale(path)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        listener.bind(path)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _remove_stale(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "there is a file that is no socket")
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "somebody listens there")
