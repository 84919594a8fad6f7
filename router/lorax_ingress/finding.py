"""Where replicas are: as the operator lists them, as a name of the network has addresses, or a file."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode

logger = logging.getLogger(__name__)

_DNS, _FILE = "dns:", "file:"
# Between two looks at names, and at files.
_LOOK_S, _LOOK_FILE_S = 2.0, 0.25


class Located(NamedTuple):
    """One replica."""

    name: str
    uri: str
    # The name that its address was found by, which its certificate bears; "": the address itself.
    host: str = ""


class ReplicaPlaces:
    """All places where replicas may be.

    Args:
        words: each ``NAME=URI``, a URI, or ``dns:HOST:PORT``, which stands for every address that
            HOST has, as a headless Service of Kubernetes has one of each pod; or ``file:PATH``,
            which has a ``NAME=URI`` or a URI on each line, and is looked at again and again.

    Raises StartupError for what is none of them.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._names = [word[len(_DNS) :] for word in words if word.startswith(_DNS)]
        self._files = [Path(word[len(_FILE) :]) for word in words if word.startswith(_FILE)]
        self._fixed = {_place(word) for word in words if not word.startswith((_DNS, _FILE))}
        for each in self._names:
            _check_port(each)
        if len({each.name for each in self._fixed}) < len(self._fixed):
            raise _wrong("two replicas have one name")

    async def follow(self) -> AsyncIterator[set[Located]]:
        """Yield where replicas are, whenever that changes."""
        known: set[Located] | None = None
        async for found in self._looks():
            if found != known:
                known = found
                yield found

    async def _looks(self) -> AsyncIterator[set[Located]]:
        """Look again and again: at files each time, at names every two seconds."""
        named: set[Located] = set()
        listed: dict[Path, set[Located]] = {}
        pause_s = _LOOK_FILE_S if self._files else _LOOK_S
        for number in itertools.count():
            if number % round(_LOOK_S / pause_s) == 0:
                named = await self._looked_up(named)
            for path in self._files:
                listed[path] = _listed(path, listed.get(path, set()))
            yield self._fixed.union(named, *listed.values())
            if not self._names and not self._files:
                await asyncio.get_running_loop().create_future()
            await asyncio.sleep(pause_s)

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
                return known
            found |= {_at(address[4])._replace(host=host) for address in answers}
        return found


def _listed(path: Path, known: set[Located]) -> set[Located]:
    """Read a file of places; where that fails, what was known stays."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
        return {_place(line) for line in lines if line and not line.startswith("#")}
    except (OSError, UnicodeDecodeError, StartupError) as error:
        logger.warning("%s says not where replicas are: %s", path, error)
        return known


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
        f"--replica: {why}; give NAME=HOST:PORT, NAME=unix:PATH, dns:HOST:PORT for all addresses "
        "of a name, or file:PATH with one of the first two on each line",
        ExitCode.BAD_CONFIG,
    )
