"""The controller over a cluster that is only played."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from lorax_launcher.placing.controller import Controller, GroupHandle, GroupLostError
from lorax_launcher.placing.values import (
    GroupLoad,
    GroupReport,
    GroupSpec,
    GroupState,
    ServiceSpec,
)

SPEC = GroupSpec(options=("--model-id", "m"), store_dir="/tmp/stores")


@dataclass
class PlayedGroup:
    """A group that is what the test says."""

    number: int
    spec: GroupSpec
    state: GroupState | None = GroupState.READY
    is_dead: bool = False
    is_removed: bool = False
    error: str = ""
    load: GroupLoad = field(default_factory=GroupLoad)

    async def report(self) -> GroupReport | None:
        if self.is_dead:
            raise GroupLostError("its node is gone")
        if self.state is None:
            return None
        return GroupReport(
            state=self.state, spec=self.spec, uri=f"h:{self.number}", error=self.error,
            load=self.load,
        )  # fmt: skip

    async def drain(self) -> None:
        self.state = GroupState.DRAINING

    def remove(self) -> None:
        self.is_removed = True


@dataclass
class PlayedCluster:
    """A cluster with room for everybody, where new groups are in a state of the test's choice."""

    new: GroupState | None = GroupState.READY
    error: str = ""
    groups: dict[int, PlayedGroup] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    now: float = 0.0

    def place(self, number: int, spec: GroupSpec) -> GroupHandle:
        self.groups[number] = PlayedGroup(number, spec, self.new, error=self.error)
        return self.groups[number]

    def find(self) -> dict[int, GroupHandle]:
        return {number: each for number, each in self.groups.items() if not each.is_removed}

    def last(self) -> int:
        return max(self.groups, default=0)

    async def tell_ingresses(self, places: Mapping[str, str]) -> None:
        self.places = dict(places)

    def alive(self) -> list[int]:
        return sorted(number for number, each in self.groups.items() if not each.is_removed)


def controller(cluster: PlayedCluster, least: int = 1, most: int | None = None) -> Controller:
    service = ServiceSpec(group=SPEC, least=least, most=most or least)
    return Controller(cluster, service, clock=lambda: cluster.now)


def looks(made: Controller, cluster: PlayedCluster, num: int = 2, seconds: float = 1.0) -> None:
    async def scene() -> None:
        for _ in range(num):
            cluster.now += seconds
            await made.look()

    asyncio.run(scene())


def test_groups_are_started_and_the_ingress_is_told() -> None:
    cluster = PlayedCluster()
    made = controller(cluster, 3)
    looks(made, cluster, 1)
    assert cluster.places == {}
    looks(made, cluster)
    assert cluster.places == {f"group-{n}": f"h:{n}" for n in (1, 2, 3)}
    assert made.status()["wanted"] == 3


def test_a_group_that_loads_its_model_is_no_place() -> None:
    cluster = PlayedCluster(new=GroupState.STARTING)
    made = controller(cluster)
    looks(made, cluster)
    assert cluster.places == {}


def test_a_lost_group_is_replaced_under_another_name() -> None:
    cluster = PlayedCluster()
    made = controller(cluster, 2)
    looks(made, cluster)
    cluster.groups[1].is_dead = True
    looks(made, cluster)
    assert cluster.alive() == [2, 3]
    assert cluster.places == {"group-2": "h:2", "group-3": "h:3"}
    assert cluster.groups[1].is_removed


def test_scaling_down_drains_and_waits_for_the_end() -> None:
    cluster = PlayedCluster()
    made = controller(cluster, 3)
    looks(made, cluster)
    made.scale(1, 1)
    looks(made, cluster)
    # While they drain, streams are there: the ingress stays attached.
    assert len(cluster.places) == 3
    assert [n for n, g in cluster.groups.items() if g.state is GroupState.DRAINING] == [2, 3]
    for number in (2, 3):
        cluster.groups[number].state = GroupState.ENDED
    looks(made, cluster)
    assert cluster.alive() == [1]
    assert cluster.places == {"group-1": "h:1"}


def test_an_upgrade_replaces_all_with_the_new_options() -> None:
    cluster = PlayedCluster()
    made = controller(cluster, 2)
    looks(made, cluster)
    made.upgrade(("--model-id", "new"))
    for _ in range(6):
        looks(made, cluster)
        serving = [g for g in cluster.groups.values() if not g.is_removed]
        assert sum(g.state is GroupState.READY for g in serving) >= 1
        for each in serving:
            if each.state is GroupState.DRAINING:
                each.state = GroupState.ENDED
    specs = [cluster.groups[number].spec for number in cluster.alive()]
    assert [each.options for each in specs] == [("--model-id", "new")] * 2
    assert {each.generation for each in specs} == {2}


def test_what_never_serves_is_tried_more_and_more_rarely() -> None:
    cluster = PlayedCluster(new=GroupState.ENDED, error="there is no model")
    made = controller(cluster)
    looks(made, cluster, 200)
    assert 5 <= len(cluster.groups) <= 10
    assert made.status()["error"] == "there is no model"
    assert len(cluster.alive()) <= 1
    cluster.new, cluster.error = GroupState.READY, ""
    looks(made, cluster, 100)
    assert made.status()["error"] == ""


def test_what_waits_for_room_is_waited_for_and_what_falls_silent_is_not() -> None:
    cluster = PlayedCluster(new=None)
    made = controller(cluster)
    looks(made, cluster, 300)
    assert cluster.alive() == [1]
    cluster.groups[1].state = cluster.new = GroupState.READY
    looks(made, cluster)
    cluster.groups[1].state = None
    looks(made, cluster, 59)
    assert cluster.alive() == [1]
    looks(made, cluster, 4)
    assert cluster.alive() == [2]


def test_a_queue_brings_groups() -> None:
    cluster = PlayedCluster()
    made = controller(cluster, 1, 3)
    looks(made, cluster)
    cluster.groups[1].load = GroupLoad(num_queued=11)
    looks(made, cluster, 60)
    assert cluster.alive() == [1, 2, 3]


def test_a_new_controller_takes_on_what_is_there() -> None:
    cluster = PlayedCluster()
    made = controller(cluster, 1)
    looks(made, cluster)
    made.scale(3, 3)
    made.upgrade(("--model-id", "new"))
    looks(made, cluster, 1)
    new = replace(SPEC, generation=2, options=("--model-id", "new"))
    cluster.groups[2].spec = cluster.groups[3].spec = new
    heir = controller(cluster, 1)
    asyncio.run(heir.recover())
    assert heir.wanted == 3
    assert heir.service.group == new
    # The group that is still of the first generation is next; no number is used again.
    looks(heir, cluster)
    assert cluster.groups[1].state is GroupState.DRAINING
    assert cluster.alive() == [1, 2, 3, 4]


def test_the_end_drains_all() -> None:
    cluster = PlayedCluster()
    made = controller(cluster, 2)
    looks(made, cluster)
    made.close()
    looks(made, cluster)
    assert all(each.state is GroupState.DRAINING for each in cluster.groups.values())


def test_no_replica_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        controller(PlayedCluster()).scale(0, 2)


def test_one_that_begins_anew_after_all_groups_are_lost_gives_no_number_twice() -> None:
    """As when their machine was lost, with the controller."""
    cluster = PlayedCluster()
    looks(controller(cluster, 2), cluster)
    for each in cluster.groups.values():
        each.remove()
    heir = controller(cluster, 2)
    asyncio.run(heir.recover())
    looks(heir, cluster)
    assert cluster.alive() == [3, 4]
