"""The address a shard listens on: checked before the model is loaded, so that it fails early."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode

# What sockaddr_un holds on Linux, less the closing zero.
_MAX_SOCKET_PATH = 107
_CONNECT_TIMEOUT_S = 1.0
# Nobody but the user who runs the shard.
_PRIVATE = 0o177


def socket_path(uri: str) -> Path | None:
    """Return the path of a unix socket's address; None for host:port."""
    if not uri.startswith("unix:"):
        return None
    path = uri.removeprefix("unix:")
    return Path("/" + path.lstrip("/") if path.startswith("//") else path)


def clear_stale(uri: str) -> None:
    """Remove the socket of a process that is gone; StartupError when the address cannot be taken.

    The socket of a process that still listens is left alone and refused.
    """
    path = socket_path(uri)
    if path is None:
        return
    if len(str(path).encode()) > _MAX_SOCKET_PATH:
        raise refused(uri, f"its path is longer than the {_MAX_SOCKET_PATH} bytes of a socket")
    if not path.parent.is_dir():
        raise refused(uri, "its folder does not exist")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise refused(uri, "a file that is no socket has this name")
    if _is_listening(path):
        raise refused(uri, "another process listens there")
    path.unlink(missing_ok=True)


@contextmanager
def private_sockets() -> Iterator[None]:
    """Within, sockets get names that this user alone can connect to, whatever folder they are in."""
    mask = os.umask(_PRIVATE)
    try:
        yield
    finally:
        os.umask(mask)


def refused(uri: str, why: str) -> StartupError:
    """Return the error of an address that cannot be taken."""
    return StartupError(f"cannot listen on {uri}: {why}", ExitCode.SOCKET_FAILED)


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except ConnectionError:
            return False
        except OSError:  # busy, or not ours to open: somebody's all the same
            return True
        return True
