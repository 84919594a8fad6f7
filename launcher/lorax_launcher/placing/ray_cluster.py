"""What groups ask of Ray: actors by name, placement groups, nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

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

_INGRESS = "ingress-"
_GROUP, _RANK = "group-", "rank-"
# An actor that has no machine yet answers nothing.
_PATIENCE_S = 2.0


def own_place() -> tuple[str, str]:
    """Return this machine's name within Ray, and its address."""
    return ray.get_runtime_context().get_node_id(), str(ray.util.get_node_ip_address())


def ingress_name(number: int) -> str:
    """Return what the actor of an ingress is called; they count from 1."""
    return f"{_INGRESS}{number}"


def find_ingresses(name: str) -> dict[str, Any]:
    """Return the actors of a service's ingresses by their names."""
    namespace = namespace_of(name)
    names = [each for each in _actors_in(namespace) if each.startswith(_INGRESS)]
    numbers = sorted(int(each.removeprefix(_INGRESS)) for each in names)
    return {
        each: ray.get_actor(each, namespace=namespace) for each in map(ingress_name, numbers)
    }  # fmt: skip


def _actors_in(namespace: str) -> list[str]:
    return [
        each["name"] for each in ray.util.list_named_actors(all_namespaces=True)
        if each["namespace"] == namespace
    ]  # fmt: skip


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
    # Its ranks on other machines.
    ranks: tuple[Any, ...] = ()

    async def report(self) -> GroupReport | None:
        """Return what it says of itself; None: nothing in time. Raises GroupLostError."""
        try:
            asked = [self.actor.report.remote(), *(each.ping.remote() for each in self.ranks)]
            answers = asyncio.gather(*(asyncio.wrap_future(each.future()) for each in asked))
            report, *_ = await asyncio.wait_for(answers, _PATIENCE_S)
            return cast("GroupReport", report)
        except (TimeoutError, ActorUnavailableError):
            return None
        except RayActorError as error:
            raise GroupLostError(str(error).strip().splitlines()[-1]) from error

    async def drain(self) -> None:
        """Have it finish what it has and end."""
        self.actor.drain.remote()

    def remove(self) -> None:
        """End it at once if it runs, and free what is kept for it."""
        for each in (self.actor, *self.ranks):
            ray.kill(each)
        remove_placement_group(self.room)


class RayCluster:
    """The groups of one service; a GroupCluster.

    Args:
        name: of the service.
        actor: the class of a group's actor, made of its specification and the actors of its ranks.
        rank_actor: the class of a rank's on another machine, made of the same specification.
        num_ingresses: how many of them are told where groups are.
    """

    def __init__(self, name: str, actor: type, rank_actor: type, num_ingresses: int = 1) -> None:
        self._namespace = namespace_of(name)
        self._actor = actor
        self._rank_actor = rank_actor
        self._ingresses = [ingress_name(number + 1) for number in range(num_ingresses)]

    def place(self, number: int, spec: GroupSpec) -> GroupHandle:
        """Start a group as soon as there is room; ranks have a machine each."""
        bundles = [spec.bundle] * spec.num_nodes
        strategy = "STRICT_SPREAD" if spec.num_nodes > 1 else "PACK"
        room = placement_group(bundles, strategy, self._room_of(number), lifetime="detached")

        def start(actor: type, name: str, bundle: int, *arguments: object) -> Any:
            return ray.remote(actor).options(
                name=name, namespace=self._namespace, lifetime="detached", max_restarts=0,
                num_cpus=spec.cpus, num_gpus=spec.gpus, resources=dict(spec.resources),
                scheduling_strategy=PlacementGroupSchedulingStrategy(room, bundle),
            ).remote(*arguments)  # fmt: skip

        names = [f"{_RANK}{number}-{rank}" for rank in range(1, spec.num_nodes)]
        ranks = [start(self._rank_actor, name, rank, spec) for rank, name in enumerate(names, 1)]
        group = start(self._actor, f"{_GROUP}{number}", 0, spec, names)
        return RayGroup(group, room, tuple(ranks))

    def find(self) -> dict[int, GroupHandle]:
        """Return the groups that there are, by number."""
        names = _actors_in(self._namespace)
        for number in self._rooms():
            if f"{_GROUP}{number}" not in names:
                # Kept for a group that is gone.
                remove_placement_group(get_placement_group(self._room_of(number)))
        numbers = [int(name.removeprefix(_GROUP)) for name in names if name.startswith(_GROUP)]
        return {number: self._group(number, names) for number in numbers}

    def _group(self, number: int, names: Sequence[str]) -> RayGroup:
        ranks = [name for name in names if name.startswith(f"{_RANK}{number}-")]
        actor, *others = (
            ray.get_actor(name, namespace=self._namespace) for name in (f"{_GROUP}{number}", *ranks)
        )
        return RayGroup(actor, get_placement_group(self._room_of(number)), tuple(others))

    def last(self) -> int:
        """Return the highest number that a group has or had, as far as Ray remembers it."""
        return max(self._rooms(removed_too=True), default=0)

    def _rooms(self, *, removed_too: bool = False) -> set[int]:
        """Return the groups that something is kept for, by number."""
        prefix = self._room_of("")
        found = {
            each["name"].removeprefix(prefix)
            for each in ray.util.placement_group_table().values()
            if each["name"].startswith(prefix) and (removed_too or each["state"] != "REMOVED")
        }
        return {int(each) for each in found if each.isdigit()}

    def _room_of(self, number: int | str) -> str:
        return f"{self._namespace}-{_GROUP}{number}"

    async def tell_ingresses(self, places: Mapping[str, str]) -> None:
        """Say where replicas are; an ingress that starts again is told at the next look."""
        for name in self._ingresses:
            # One whose machine is gone may be gone with it.
            with suppress(ValueError):
                ray.get_actor(name, namespace=self._namespace).tell.remote(dict(places))
