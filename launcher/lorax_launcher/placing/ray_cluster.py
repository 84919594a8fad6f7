"""What groups ask of Ray: actors by name, placement groups, nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lorax_launcher.placing.controller import GroupHandle, GroupLostError
from lorax_launcher.placing.values import GroupReport, GroupSpec

INGRESS = "ingress"
_GROUP = "group-"
# An actor that has no machine yet answers nothing.
_PATIENCE_S = 2.0


def own_place() -> tuple[str, str]:
    """Return this machine's name within Ray, and its address."""
    return ray.get_runtime_context().get_node_id(), str(ray.util.get_node_ip_address())


def connect(address: str, name: str) -> None:
    """Join a cluster that runs, in the namespace of a service; ConnectionError if there is none."""
    ray.init(
        address=address, namespace=namespace_of(name), log_to_driver=False, logging_level="warning"
    )


def namespace_of(name: str) -> str:
    """Return where a service has its actors."""
    return f"lorax-{name}"


@dataclass(frozen=True, slots=True)
class RayGroup:
    """A group's actor, in a placement group of its own; a GroupHandle."""

    actor: Any
    room: Any

    async def report(self) -> GroupReport | None:
        """Return what it says of itself; None: nothing in time. Raises GroupLostError."""
        try:
            asked = self.actor.report.remote()
            return await asyncio.wait_for(asyncio.wrap_future(asked.future()), _PATIENCE_S)
        except (TimeoutError, ActorUnavailableError):
            return None
        except RayActorError as error:
            raise GroupLostError(str(error).strip().splitlines()[-1]) from error

    async def drain(self) -> None:
        """Have it finish what it has and end."""
        self.actor.drain.remote()

    def remove(self) -> None:
        """End it at once if it runs, and free what is kept for it."""
        ray.kill(self.actor)
        remove_placement_group(self.room)


class RayCluster:
    """The groups of one service; a GroupCluster.

    Args:
        name: of the service.
        actor: the class of a group's actor, made of its specification.
    """

    def __init__(self, name: str, actor: type) -> None:
        self._namespace = namespace_of(name)
        self._actor = actor

    def place(self, number: int, spec: GroupSpec) -> GroupHandle:
        """Start a group as soon as there is room."""
        name = f"{_GROUP}{number}"
        room = placement_group([spec.bundle], name=f"{self._namespace}-{name}", lifetime="detached")
        made = ray.remote(self._actor).options(
            name=name, namespace=self._namespace, lifetime="detached", max_restarts=0,
            num_cpus=spec.cpus, num_gpus=spec.gpus, resources=dict(spec.resources),
            scheduling_strategy=PlacementGroupSchedulingStrategy(room, 0),
        )  # fmt: skip
        return RayGroup(made.remote(spec), room)

    def find(self) -> dict[int, GroupHandle]:
        """Return the groups that there are, by number."""
        names = [
            each["name"] for each in ray.util.list_named_actors(all_namespaces=True)
            if each["namespace"] == self._namespace and each["name"].startswith(_GROUP)
        ]  # fmt: skip
        return {int(name.removeprefix(_GROUP)): self._group(name) for name in names}

    def _group(self, name: str) -> RayGroup:
        room = get_placement_group(f"{self._namespace}-{name}")
        return RayGroup(ray.get_actor(name, namespace=self._namespace), room)

    async def tell_ingress(self, places: Mapping[str, str]) -> None:
        """Say where replicas are; an ingress that starts again is told at the next look."""
        ray.get_actor(INGRESS, namespace=self._namespace).tell.remote(dict(places))
