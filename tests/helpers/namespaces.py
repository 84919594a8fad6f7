"""Two network namespaces with a link between them, and nothing else in either.

Each is held by a process of ours and ends with it, so that nothing is left behind however the
test ends; the host's own interfaces are neither seen nor touched. Without the rights of root, a
user namespace gives them where the system allows that.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence

_LINK = "link{}"
_READY = "there"


class NoNamespacesError(Exception):
    """This machine makes no network namespaces for us; the text is what it says."""


class Namespace:
    """One of the two, with an address on the link."""

    def __init__(self, holder: subprocess.Popen[str], number: int, *, is_root: bool) -> None:
        self.address = f"10.213.7.{number + 1}"
        self.interface = _LINK.format(number)
        self.holder = holder
        self._user = () if is_root else ("--user", "--preserve-credentials")

    def inside(self, *words: str) -> list[str]:
        """Return the command line that runs a program in here."""
        return ["nsenter", "--target", str(self.holder.pid), "--net", *self._user, "--", *words]

    def run(self, *words: str) -> str:
        """Run a program in here and return its output; NoNamespacesError if it fails."""
        return _run(self.inside(*words))


@contextlib.contextmanager
def two_namespaces() -> Iterator[tuple[Namespace, Namespace]]:
    """Make both and the link; NoNamespacesError says why they cannot be made."""
    is_root = os.geteuid() == 0
    with contextlib.ExitStack() as held:
        mine = () if is_root else ("--user", "--map-root-user")
        first = Namespace(_hold(["unshare", *mine, "--net"], held), 0, is_root=is_root)
        # Of the first one's user namespace, or neither could give the other an end of the link.
        command = [*first.inside("unshare", "--net")] if mine else ["unshare", "--net"]
        second = Namespace(_hold(command, held), 1, is_root=is_root)
        both = (first, second)
        ends = (first.interface, "type", "veth", "peer", "name", second.interface)
        first.run("ip", "link", "add", *ends, "netns", str(second.holder.pid))
        for each in both:
            each.run("ip", "address", "add", f"{each.address}/24", "dev", each.interface)
            each.run("ip", "link", "set", each.interface, "up")
            each.run("ip", "link", "set", "lo", "up")
        yield both


def _hold(unshare: Sequence[str], held: contextlib.ExitStack) -> subprocess.Popen[str]:
    """Start what keeps a namespace alive: it reads its input, which ends with this process."""
    try:
        holder = subprocess.Popen(
            [*unshare, "sh", "-c", f"echo {_READY}; exec cat"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except OSError as error:
        raise NoNamespacesError(str(error)) from error
    held.callback(_end, holder)
    assert holder.stdout is not None
    said = holder.stdout.readline().strip()
    if said != _READY:
        raise NoNamespacesError(said)
    return holder


def _end(holder: subprocess.Popen[str]) -> None:
    with holder:
        holder.kill()


def _run(words: Sequence[str]) -> str:
    try:
        run = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    except OSError as error:
        raise NoNamespacesError(str(error)) from error
    if run.returncode:
        raise NoNamespacesError(f"{' '.join(words)}: {run.stderr.strip() or run.returncode}")
    return run.stdout
