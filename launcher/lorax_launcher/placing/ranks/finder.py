"""Where the ranks of a group over several machines listen and meet."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Sequence

import ray
from ray.exceptions import RayError

from lorax_launcher.elsewhere import RanksElsewhere
from lorax_launcher.placing.server import RankFault
from lorax_launcher.placing.values import GroupSpec

_LOOPBACK = "127.0.0.1"
_PROXY = "lorax_launcher.placing.ranks.proxy"


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class RankFinder:
    """Has the machines of a group's other ranks get ready.

    Args:
        spec: what the group is started with.
        host: the address of rank 0's machine.
        ranks: the names of the others' actors, the second one first.
    """

    def __init__(self, spec: GroupSpec, host: str, ranks: Sequence[str]) -> None:
        self._spec = spec
        self._host = host
        self._ranks = ranks

    async def find(self) -> tuple[RanksElsewhere, str]:
        """Return all places, and where the ranks meet; raises RankFault."""
        try:
            asked = [ray.get_actor(name).prepare.remote() for name in self._ranks]
            told = await asyncio.gather(*(asyncio.wrap_future(each.future()) for each in asked))
        except RayError as error:
            raise RankFault(f"a rank's machine is lost: {error}") from error
        if wrong := [text for _, _, text in told if text]:
            raise RankFault(wrong[0])
        hosts = [self._host, *(host for host, _, _ in told)]
        ports = [free_port(), *(port for _, port, _ in told)]
        hosts = listening_hosts(self._spec, hosts)
        programs = {rank: _proxy(name) for rank, name in enumerate(self._ranks, 1)}
        uris = tuple(f"{host}:{port}" for host, port in zip(hosts, ports))
        placed = RanksElsewhere(uris=uris, programs=programs, tls_dir=self._spec.tls_dir)
        return placed, f"{hosts[0]}:{free_port()}"


def listening_hosts(spec: GroupSpec, hosts: Sequence[str]) -> list[str]:
    """Return where ranks listen; RankFault where others could connect and nothing protects that."""
    if spec.tls_dir is not None:
        return [f"[{host}]" if ":" in host else host for host in hosts]
    if len(set(hosts)) > 1:
        raise RankFault(f"ranks on several machines ({', '.join(hosts)}) need --tls-dir")
    return [_LOOPBACK] * len(hosts)


def _proxy(name: str) -> tuple[str, ...]:
    """Return the program that stands for a rank beside the launcher."""
    context = ray.get_runtime_context()
    return sys.executable, "-m", _PROXY, context.gcs_address, context.namespace, name
