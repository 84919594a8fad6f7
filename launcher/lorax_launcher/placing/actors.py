"""What runs in Ray's workers: thin shells around the parts that need no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lorax_contract import logs
from lorax_launcher.placing.controller import Controller
from lorax_launcher.placing.ingress import IngressKeeper
from lorax_launcher.placing.ranks.finder import RankFinder, free_port
from lorax_launcher.placing.ranks.host import RankHost, RankNews
from lorax_launcher.placing.ray_cluster import RayCluster, own_place
from lorax_launcher.placing.server import GroupServer
from lorax_launcher.placing.values import GroupReport, GroupSpec, IngressSpec, ServiceSpec

logger = logging.getLogger(__name__)


class GroupActor:
    """A server group; Ray makes it inside a running loop.

    Args:
        spec: what it is started with.
        ranks: the names of its other ranks' actors, the second one first.
    """

    def __init__(self, spec: GroupSpec, ranks: Sequence[str] = ()) -> None:
        logs.configure(bound={"process": "group"})
        node, host = own_place()
        finding = RankFinder(spec, host, ranks).find if ranks else None
        self._server = GroupServer(spec, node, host, finding)
        self._running = asyncio.get_running_loop().create_task(self._server.run())

    async def report(self) -> GroupReport:
        """Return what it says of itself."""
        return self._server.report

    async def drain(self) -> None:
        """Have it finish what it has and end."""
        self._server.drain()


class RankActor:
    """A rank on a machine of its own.

    Args:
        spec: what its group is started with.
    """

    def __init__(self, spec: GroupSpec) -> None:
        logs.configure(bound={"process": "rank"})
        self._spec = spec
        self._host = RankHost(spec.store_dir)
        self._watching = asyncio.get_running_loop().create_task(self._host.watch())

    async def prepare(self) -> tuple[str, int, str]:
        """Have the model here; return this machine's address, a free port, and what went wrong."""
        host = own_place()[1]
        wrong = await self._host.prepare(self._spec.options)
        return host, free_port(), wrong

    async def ping(self) -> None:
        """Do nothing: it is there."""

    async def start(self, config: str, variables: Mapping[str, str]) -> None:
        """Start the rank, in place of one that runs."""
        await self._host.start(config, variables)

    async def news(self) -> RankNews:
        """Return what there is to tell since the last question."""
        return await self._host.news()

    async def terminate(self) -> None:
        """Ask the rank to end."""
        self._host.terminate()

    async def end(self) -> None:
        """End the rank at once."""
        await self._host.end()


class IngressActor:
    """An ingress of a service."""

    def __init__(self, spec: IngressSpec) -> None:
        logs.configure(bound={"process": "ingress-actor"})
        self._keeper = IngressKeeper(spec)
        self._running = asyncio.get_running_loop().create_task(self._keeper.run())

    async def tell(self, places: Mapping[str, str]) -> None:
        """Say where replicas are."""
        self._keeper.tell(places)

    async def status(self) -> dict[str, str]:
        """Return where it is, where clients ask, and what went wrong last."""
        keeper = self._keeper
        about = {"url": keeper.url, "metrics": keeper.metrics, "error": keeper.error}
        return {"host": own_place()[1], **about}

    async def close(self) -> None:
        """Finish what it has; returns once it has ended."""
        self._keeper.end()
        await self._running
        self._keeper.close()


class ControllerActor:
    """Keeps the groups of a service; one that Ray starts again takes on what it finds."""

    def __init__(self, name: str, service: ServiceSpec) -> None:
        logs.configure(bound={"process": "controller"})
        self._controller = Controller(
            RayCluster(name, GroupActor, RankActor, service.num_ingresses), service
        )
        self._running = asyncio.get_running_loop().create_task(self._controller.run())

    async def status(self) -> dict[str, Any]:
        """Return what an operator sees."""
        return self._controller.status()

    async def scale(self, least: int, most: int) -> None:
        """Keep between so many replicas."""
        self._controller.scale(least, most)

    async def upgrade(self, options: tuple[str, ...]) -> None:
        """Replace all groups by such with other options, one after the other."""
        self._controller.upgrade(options)

    async def close(self) -> None:
        """Drain all groups."""
        self._controller.close()
