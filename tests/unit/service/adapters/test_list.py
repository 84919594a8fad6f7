"""Pages of adapters: complete, in order, filtered, and no dearer when more adapters are known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

import pytest
from tests.helpers.adapter_world import (
    Sources,
    adapter_world,
    directory_with,
    fetched,
    ref,
    selection,
)
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterUnavailableError, Reason, refused
from lorax_router.core.adapters.record import AdapterCapacity
from lorax_router.service.adapters.catalog import AdapterCatalog
from lorax_router.service.adapters.directory import AdapterDirectory
from lorax_router.service.adapters.listing import ListQuery
from lorax_router.service.adapters.management import AdapterManager
from lorax_router.service.adapters.metrics import AdapterResidency, AdapterUsage
from lorax_router.service.requests import MergedAdapters
from lorax_router.shards.fake.shard import FakeShard


async def pages(client: Any, **params: Any) -> list[list[str]]:
    """The ids of all pages over HTTP."""
    found: list[list[str]] = []
    while True:
        answer = await client.get("/v1/adapters", params=params)
        assert answer.status_code == 200
        document = answer.json()
        found.append([each["adapter_id"] for each in document["adapters"]])
        if document["next_cursor"] is None:
            return found
        params["cursor"] = document["next_cursor"]


@in_loop
async def test_pages_are_in_order_and_hold_everything_once():
    async with adapter_world() as world:
        world.shard.step_delay_s = 0.001
        world.sources.contents["d"] = fetched("old", valid_s=0)
        stream = await world.stream("d", 150)
        world.sources.contents["d"] = fetched("new", valid_s=0)
        for name in ("d", "b", "e", "a", "c"):
            await world.generate(name, 1)
        merged = MergedAdapters(ids=["a", "b"], weights=[1.0, 1.0])
        await world.generate(None, 1, merged_adapters=merged)
        for limit in (1, 2, 3, 7, 100):
            found = await pages(world.client, limit=limit)
            assert [*chain(*found)] == ["a", "b", "c", "d", "e", "merged:a+b", "d"]
            assert all(len(page) == limit for page in found[:-1])
        await stream.aclose()


@in_loop
async def test_a_page_goes_on_where_the_one_before_ended_whatever_came_and_went():
    async with adapter_world() as world:
        for name in "bdfh":
            await world.generate(name, 1)
        first = (await world.client.get("/v1/adapters?limit=2")).json()
        assert [each["adapter_id"] for each in first["adapters"]] == ["b", "d"]
        await world.parts.adapters.unload(selection("d"))
        for name in "ae":
            await world.generate(name, 1)
        second = await pages(world.client, limit=2, cursor=first["next_cursor"])
        assert second == [["e", "f"], ["h"]]


@in_loop
async def test_filters_choose_by_source_id_and_state():
    async with adapter_world(max_active_adapters=1) as world:
        world.sources.contents["bad"] = refused("it is a pickle")
        for name in ("a", "b"):
            await world.generate(name, 1)
        await world.generate("a", 1, adapter_source="s3")
        await world.generate("a@v2", 1, adapter_source="hub")
        with pytest.raises(AdapterUnavailableError):
            await world.generate("bad", 1)
        for params, expected in (
            ({"adapter_source": "local"}, ["a", "b", "bad"]),
            ({"adapter_id": "a"}, ["a", "a", "s3://a"]),
            ({"adapter_id": "a@v2"}, ["a"]),
            ({"adapter_id": "a", "adapter_source": "s3"}, ["s3://a"]),
            ({"state": "refused"}, ["bad"]),
            # Two of the names lead to one content.
            ({"state": "resident"}, ["a", "a"]),
            ({"state": "absent"}, ["b", "s3://a"]),
            ({"adapter_id": "none"}, []),
        ):
            found = await pages(world.client, **params)
            assert [*chain(*found)] == expected, params


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"limit": "0"}, "`limit` must be from 1 to 500, got 0"),
        ({"limit": "501"}, "`limit` must be from 1 to 500"),
        ({"limit": "-1"}, "`limit` must be a number from 1 to 500"),
        ({"limit": "ten"}, "`limit` must be a number"),
        ({"limit": "9" * 5000}, "`limit` must be a number"),
        ({"cursor": "x"}, "`cursor` is not one that a list gave"),
        ({"cursor": "aGVsbG8"}, "`cursor` is not one"),
        ({"cursor": "bW1t"}, "`cursor` is not one"),
        ({"cursor": "\u00e9"}, "`cursor` is not one"),
        ({"state": "gone"}, "`state` 'gone' is not known; choose one of resolving, refused"),
        ({"adapter_source": "ftp"}, "`adapter_source` 'ftp' is not known"),
    ],
)
def test_what_is_no_page_is_refused_in_words(params, words):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            answer = await world.client.get("/v1/adapters", params=params)
            assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
            assert words in answer.json()["error"]

    scene()


# --- cost --------------------------------------------------------------------------

KNOWN = 16_384


class CountedNames(dict[str, Any]):
    """Names, and how many of them were looked at."""

    num_reads = 0

    def get(self, key: str, default: Any = None) -> Any:
        self.num_reads += 1
        return super().get(key, default)

    def values(self) -> Any:
        self.num_reads += len(self)
        return super().values()

    def items(self) -> Any:
        self.num_reads += len(self)
        return super().items()

    def __iter__(self) -> Any:
        self.num_reads += len(self)
        return super().__iter__()


@asynccontextmanager
async def with_names(num: int) -> AsyncIterator[tuple[AdapterManager, AdapterDirectory, Any]]:
    """A directory that knows so many names, eight of which are on the shards."""
    shard = FakeShard()
    shard.on_fetch = sources = Sources()
    async with directory_with(shard, max_active=16, max_idle=num) as (directory, manager):
        for number in range(num):
            name = f"n{number:05}"
            if number % 4 == 3:
                sources.contents[name] = AdapterUnavailableError(Reason.NOT_FOUND, "none")
                with pytest.raises(AdapterUnavailableError):
                    await directory.acquire(selection(name))
            else:
                (await directory.acquire(selection(name))).release()
        for number in range(0, 32, 4):
            await manager.load(selection(f"n{number:05}"))
        catalog, table = directory.catalog, directory.catalog.engine._scheduler.adapters
        counted = []
        for owner, attribute in (
            (catalog.names, "_names"),
            (catalog, "_entries"),
            (catalog, "by_handle"),
            (table, "_records"),
        ):
            counted.append(CountedNames(getattr(owner, attribute)))
            setattr(owner, attribute, counted[-1])
        yield manager, directory, lambda: sum(each.num_reads for each in counted)


def scrape(catalog: AdapterCatalog) -> dict[str, float]:
    """The states of all names as a scrape has them."""
    capacity = AdapterCapacity(16, 8, None, 0)
    residency = AdapterResidency(catalog, AdapterUsage(50), lambda: capacity, model_name="base")
    (states,) = [each for each in residency.collect() if each.name == "lorax_adapters"]
    return {sample.labels["state"]: sample.value for sample in states.samples if sample.value}


@in_loop
async def test_a_page_a_scrape_and_a_request_cost_the_same_with_many_names_as_with_few():
    reads: dict[int, list[int]] = {}
    for num in (256, KNOWN):
        async with with_names(num) as (manager, directory, num_reads):
            states = scrape(directory.catalog)
            assert states == {"resident": 8, "absent": num * 3 // 4 - 8, "refused": num // 4}
            costs = [num_reads()]
            page = await manager.pages.listing(ListQuery(limit=50))
            assert [each["adapter_id"] for each in page["adapters"]][:2] == ["n00000", "n00001"]
            costs.append(num_reads())
            middle = await manager.pages.listing(ListQuery(limit=50, cursor=page["next_cursor"]))
            assert len(middle["adapters"]) == 50
            costs.append(num_reads())
            (await directory.acquire(selection("n00000"))).release()
            costs.append(num_reads())
            await manager.load(selection("new"))
            costs.append(num_reads())
            await manager.unload(selection("new"))
            costs.append(num_reads())
            reads[num] = [after - before for before, after in zip([0, *costs], costs, strict=False)]
    # A page of 50 lines looks at some things for each of them, and at nothing else.
    for few, many in zip(reads[256], reads[KNOWN], strict=True):
        assert many <= min(few + 4, 50 * 5), reads


@in_loop
async def test_a_filter_that_few_pass_gives_a_page_after_looking_at_so_many():
    async with with_names(KNOWN) as (manager, _, num_reads):
        before, found, cursor, rounds = num_reads(), [], None, 0
        while rounds == 0 or cursor is not None:
            page = await manager.pages.listing(
                ListQuery(limit=500, state="resident", cursor=cursor)
            )
            found += [each["adapter_id"] for each in page["adapters"]]
            cursor, rounds = page["next_cursor"], rounds + 1
            assert num_reads() - before < 1_000 * 5
            before = num_reads()
        assert found == [f"n{number:05}" for number in range(0, 32, 4)]
        assert rounds == KNOWN // 1_000 + 1


@in_loop
async def test_states_are_counted_as_the_list_has_them_whatever_happens():
    async with adapter_world(max_active_adapters=2) as world:

        async def check(step: str) -> None:
            listed = (await world.client.get("/v1/adapters?limit=500")).json()["adapters"]
            states: dict[str, float] = {}
            for each in listed:
                states[each["state"]] = states.get(each["state"], 0.0) + 1.0
            assert scrape(world.catalog) == states, step

        names, adapters = world.sources.contents, world.parts.adapters
        names |= {"a": fetched("x"), "b": fetched("x"), "bad": refused("no")}
        names["down"] = AdapterUnavailableError(Reason.TRANSIENT, "down")
        for name in ("a", "b", "c", "d", "bad", "down"):
            await asyncio.gather(world.task(name, 1), return_exceptions=True)
            await check(name)
        names["a"] = refused("broken now")
        with pytest.raises(AdapterUnavailableError):
            await adapters.reload(selection("a"))
        await check("a failed reload")
        names["bad"] = fetched("x")
        await adapters.load(selection("bad"))
        await check("a repaired one")
        merged = MergedAdapters(ids=["c", "d"], weights=[1.0, 1.0])
        await world.generate(None, 1, merged_adapters=merged)
        await check("a merge")
        names["c"] = future = asyncio.get_running_loop().create_future()
        names["new"] = asyncio.get_running_loop().create_future()
        reloading = asyncio.create_task(adapters.reload(selection("c")))
        waiting = world.task("new", 1)
        await until(lambda: len(world.catalog.names.resolving) == 2)
        await check("looking up")
        future.set_result(fetched("another"))
        await reloading
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await check("looked up")
        world.shard.step_delay_s = 0.001
        names["d"] = fetched("d", valid_s=0)
        stream = await world.stream("d", 100)
        unloading = asyncio.create_task(adapters.unload(selection("d")))
        await until(lambda: world.catalog.names.find(ref("d")) is None)
        await check("unloading")
        await stream.aclose()
        await unloading
        for name in ("a", "b", "bad", "c"):
            await adapters.unload(selection(name))
            await check(f"{name} unloaded")
