"""What runs in Ray's workers: thin shells around the parts that need no Ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from lorax_contract import logs
from lorax_launcher.placing.controller import Controller
from lorax_launcher.placing.ingress import IngressKeeper
from lorax_launcher.placing.ray_cluster import RayCluster, own_place
from lorax_launcher.placing.server import GroupServer
from lorax_launcher.placing.values import GroupReport, GroupSpec, IngressSpec, ServiceSpec

logger = logging.getLogger(__name__)


class GroupActor:
    """A server group; Ray makes it inside a running loop."""

    def __init__(self, spec: GroupSpec) -> None:
        logs.configure(bound={"process": "group"})
        self._server = GroupServer(spec, *own_place())
        self._running = asyncio.get_running_loop().create_task(self._server.run())

    async def report(self) -> GroupReport:
        """Return what it says of itself."""
        return self._server.report

    async def drain(self) -> None:
        """Have it finish what it has and end."""
        self._server.drain()


class IngressActor:
    """The ingress of a service."""

    def __init__(self, spec: IngressSpec) -> None:
        logs.configure(bound={"process": "ingress-actor"})
        self._keeper = IngressKeeper(spec)
        self._running = asyncio.get_running_loop().create_task(self._keeper.run())

    async def tell(self, places: Mapping[str, str]) -> None:
        """Say where replicas are."""
        self._keeper.tell(places)

    async def status(self) -> dict[str, str]:
        """Return where clients ask, and what went wrong last."""
        return {"url": self._keeper.url, "error": self._keeper.error}

    async def close(self) -> None:
        """Finish what it has; returns once it has ended."""
        self._keeper.end()
        await self._running
        self._keeper.close()


class ControllerActor:
    """Keeps the groups of a service; one that Ray starts again takes on what it finds."""

    def __init__(self, name: str, service: ServiceSpec) -> None:
        logs.configure(bound={"process": "controller"})
        self._controller = Controller(RayCluster(name, GroupActor), service)
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
