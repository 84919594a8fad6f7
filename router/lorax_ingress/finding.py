"""Where replicas are: as the operator lists them, or as a name of the network has addresses."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode

logger = logging.getLogger(__name__)

_DNS = "dns:"
# Between two looks at names.
_LOOK_S = 2.0


class Located(NamedTuple):
    """One replica."""

    name: str
    uri: str


class ReplicaPlaces:
    """All places where replicas may be.

    Args:
        words: each ``NAME=URI``, a URI, or ``dns:HOST:PORT``, which stands for every address that
            HOST has, as a headless Service of Kubernetes has one of each pod.

    Raises StartupError for what is none of them.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._names = [word[len(_DNS) :] for word in words if word.startswith(_DNS)]
        self._fixed = {_place(word) for word in words if not word.startswith(_DNS)}
        for each in self._names:
            _check_port(each)
        if len({each.name for each in self._fixed}) < len(self._fixed):
            raise _wrong("two replicas have one name")

    async def follow(self) -> AsyncIterator[set[Located]]:
        """Yield where replicas are, whenever that changes."""
        known: set[Located] | None = None
        while True:
            found = self._fixed | await self._looked_up(known or set())
            if found != known:
                known = found
                yield found
            if not self._names:
                await asyncio.get_running_loop().create_future()
            await asyncio.sleep(_LOOK_S)

    async def _looked_up(self, known: set[Located]) -> set[Located]:
        """Look all names up; where that fails, what was known stays."""
        found: set[Located] = set()
        for each in self._names:
            host, _, port = each.rpartition(":")
            try:
                answers = await asyncio.get_running_loop().getaddrinfo(
                    host.strip("[]"), int(port), type=socket.SOCK_STREAM
                )
            except OSError as error:
                logger.warning("%s cannot be looked up: %s", host, error)
                return known - self._fixed
            found |= {_at(address[4]) for address in answers}
        return found


def _at(address: tuple[object, ...]) -> Located:
    host, port = str(address[0]), address[1]
    uri = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return Located(uri, uri)


def _place(word: str) -> Located:
    name, is_named, uri = word.rpartition("=")
    if not uri.startswith("unix:"):
        _check_port(uri)
    return Located(name if is_named else uri, uri)


def _check_port(uri: str) -> None:
    host, _, port = uri.rpartition(":")
    if not host or not port.isdigit():
        raise _wrong(f"{uri!r} is no address")


def _wrong(why: str) -> StartupError:
    return StartupError(
        f"--replica: {why}; give NAME=HOST:PORT, NAME=unix:PATH, or dns:HOST:PORT for all addresses "
        "of a name",
        ExitCode.BAD_CONFIG,
    )
