"""What an ingress knows of replicas' adapters: by all their names, merged ones, those in host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.adapter_world import AdapterWorld
from tests.helpers.attached_replicas import AttachingFleet, ingress, request, served, until
from tests.helpers.in_loop import in_loop

from lorax_ingress.routing.values import ReplicaView
from lorax_router.fronts.load import LoadTeller
from lorax_router.service.adapters.selection import SelectionPolicy, place_key
from lorax_router.service.requests import MergedAdapters

NUM = 8
ALIASES = [f"name{number}=local:adapter{number}" for number in range(NUM)]


async def place_of(made: AttachingFleet, adapter: str | None, **params: Any) -> str:
    """Ask for an adapter; where the request went."""
    before = {**made.fleet._metrics._routed}
    await made.service.generate(request(adapter, **params))
    after = made.fleet._metrics._routed
    (place,) = {key[0] for key in after if after[key] > before.get(key, 0)}
    return place


def views(made: AttachingFleet) -> dict[str, ReplicaView]:
    return made.fleet._views


@in_loop
async def test_two_names_of_one_adapter_go_to_one_replica(tmp_path: Path) -> None:
    uris = {name: f"unix:{tmp_path}/{name}" for name in "ab"}
    async with (
        served(uris["a"], adapter_aliases=ALIASES) as world, served(uris["b"], adapter_aliases=ALIASES),
        ingress() as made,
    ):  # fmt: skip
        for name, uri in uris.items():
            made.attach(name, uri)
        await until(lambda: len(views(made)) == 2)
        found = set()
        for number in range(NUM):
            place = await place_of(made, f"name{number}", adapter_source=None)
            assert await place_of(made, f"adapter{number}") == place
            found.add(place)
        assert found == {"a", "b"}
        keys = {f"local:adapter{number}" for number in range(NUM)}
        await until(lambda: set().union(*(view.resident for view in views(made).values())) == keys)
        await _a_name_given_anew(made, world)


async def _a_name_given_anew(made: AttachingFleet, world: AdapterWorld) -> None:
    """What a name comes to stand for is known, and that it stands for nothing any more."""
    book = world.parts.selections.aliases
    book.put(book.make("name0", book.find("name1").target))  # type: ignore[union-attr]
    await until(lambda: made.fleet.aliases._targets["a"]["name0"] == "local:adapter1")
    book.drop("name0")
    await until(lambda: "name0" not in made.fleet.aliases._targets["a"])
    # The other replica still knows it.
    assert made.fleet.aliases.stands_for("name0") == "local:adapter0"


@in_loop
async def test_what_a_lost_replica_called_adapters_is_forgotten(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/r"
    async with ingress() as made:
        replica = made.attach("r", uri)
        async with served(uri, adapter_aliases=ALIASES):
            await until(lambda: made.fleet.aliases.book.find("name0"))
        await until(lambda: not replica.facts)
        assert [*made.fleet.aliases.book] == []
        assert made.fleet.aliases._targets == {}


@in_loop
async def test_a_merge_is_known_by_all_that_it_is_made_of(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/r"
    merges = [MergedAdapters(ids=["poet", "pirate"], weights=[1.0, each]) for each in (0.5, 2.0)]
    wanted = [request(merged_adapters=each).parameters for each in merges]
    keys = [
        place_key(selection, lambda name: None) for params in wanted
        if (selection := SelectionPolicy().selection_of(params)) is not None
    ]  # fmt: skip
    assert len({*keys}) == 2
    async with served(uri), ingress() as made:
        made.attach("r", uri)
        await made.service.generate(request(merged_adapters=merges[0]))
        await until(lambda: keys[0] in views(made)["r"].resident)
        assert keys[1] not in views(made)["r"].resident


@in_loop
async def test_adapters_in_host_memory_are_told(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/r"
    async with served(uri, max_active_adapters=2) as world, ingress() as made:
        for number in range(3):
            await world.generate(f"adapter{number}")
        made.attach("r", uri)
        await until(lambda: "r" in views(made) and views(made)["r"].hosted)
        view = views(made)["r"]
        # Of the first two that one left which came faster: it is the cheaper one to have again.
        (hosted,) = view.hosted
        assert hosted != "local:adapter2"
        assert view.resident == {f"local:adapter{number}" for number in range(3)} - {hosted}
        # Where it is asked for, it is known to be near.
        assert made.fleet._router.fleet.hosts(hosted) == ["r"]


@in_loop
async def test_host_memory_is_asked_for_now_and_then(tmp_path: Path) -> None:
    async with served(f"unix:{tmp_path}/r", max_active_adapters=1) as world:
        now, parts = 0.0, world.parts
        report = LoadTeller(
            parts.engine,
            parts.adapters,
            parts.service.meters,
            is_open=lambda: True,
            num_slots=1,
            clock=lambda: now,
        )
        await world.generate("adapter0")
        assert report.now().hosted == []
        await world.generate("adapter1")
        for _ in range(20):
            assert report.now().hosted == []
        now = 10.0
        await until(lambda: report.now().hosted == ["local:adapter0"])
        await report.close()
