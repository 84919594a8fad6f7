"""A small file system that only a server sees, so that its disk can be full."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.server import Server

_CHUNK = b"\0" * (1 << 20)


class SmallDisk:
    """Mounted on a folder in a name space of the server's own, and gone with the server.

    Args:
        folder: where the server sees it; others see an empty folder.
        mib: its size.
    """

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        folder.mkdir()
        who = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        mount = f'mount -t tmpfs -o size={mib}m,mode=700 none "$0" && exec "$@"'
        # Before a command: runs it where the disk is there, as the same process.
        self.prefix = ["unshare", *who, "--mount", "sh", "-c", mount, str(folder)]

    @property
    def can_be_made(self) -> bool:
        """Whether this machine lets its users mount."""
        try:
            return not subprocess.run([*self.prefix, "true"], capture_output=True).returncode
        except FileNotFoundError:
            return False

    @contextmanager
    def filled(self, server: Server) -> Iterator[int]:
        """Within, not a byte more fits; gives the bytes that still did."""
        assert server.process is not None
        path = Path(f"/proc/{server.process.pid}/root{self.folder}/ballast")
        size = 0
        try:
            with path.open("wb", buffering=0) as ballast:
                try:
                    while True:
                        size += ballast.write(_CHUNK)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
            yield size
        finally:
            path.unlink(missing_ok=True)
