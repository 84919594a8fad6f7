"""When a source is asked again: reload, load, after an unload, when files left the disk."""

from __future__ import annotations

import pytest
from tests.helpers.adapter_world import (
    adapter_world,
    fetched,
    selection,
)
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import (
    AdapterQuery,
    AdapterUnavailableError,
    FetchedAdapter,
    Reason,
    refused,
)
from lorax_contract.step import AdapterHandle


@in_loop
async def test_after_a_failed_reload_the_old_goes_on_and_the_reason_stays_until_one_succeeds():
    async with adapter_world() as world:
        await world.generate("a")
        world.sources.contents["a"] = refused("its header is cut off")
        with pytest.raises(AdapterUnavailableError, match="cut off"):
            await world.parts.adapters.reload(selection("a"))
        for _ in range(2):
            await world.generate("a")
            listed = (await world.list())["a"]
            assert (listed["state"], listed["version"]) == ("resident", "1")
            assert listed["failure"] == {"reason": "refused", "text": "its header is cut off"}
        # Nobody but the reload asked.
        assert len(world.shard.queries) == 2
        world.sources.contents["a"] = fetched("a", version="2", stale=True)
        await world.parts.adapters.reload(selection("a"))
        assert (await world.list())["a"]["failure"] is not None
        world.sources.contents["a"] = fetched("a", version="2")
        await world.parts.adapters.reload(selection("a"))
        assert (await world.list())["a"]["failure"] is None


@in_loop
async def test_an_explicit_load_asks_the_source_whatever_is_remembered():
    async with adapter_world() as world:
        remembered: dict[str, Exception] = {}

        def source(query: AdapterQuery) -> FetchedAdapter:
            """Like the shards' fetcher: what failed is not tried again at once."""
            if not query.refresh and query.ref.id in remembered:
                raise remembered[query.ref.id]
            try:
                return world.sources(query)
            except AdapterUnavailableError as error:
                remembered[query.ref.id] = error
                raise

        world.shard.on_fetch = source
        world.sources.contents["y"] = AdapterUnavailableError(Reason.NOT_FOUND, "no such folder")
        with pytest.raises(AdapterUnavailableError):
            await world.generate("y")
        world.sources.contents["y"] = fetched("y")
        assert (await world.parts.adapters.load(selection("y")))["state"] == "resident"
        world.sources.contents["y"] = fetched("newer", version="2")
        assert (await world.parts.adapters.load(selection("y")))["version"] == "2"


@in_loop
async def test_after_an_unload_the_source_is_asked_also_where_another_name_has_the_content():
    async with adapter_world() as world:
        world.sources.contents = {"p1": fetched("x"), "p2": fetched("x")}
        for name in ("p1", "p2"):
            await world.generate(name)
        for ask in (world.parts.adapters.load(selection("p1")), world.generate("p1")):
            world.sources.contents["p1"] = fetched("x")
            await world.parts.adapters.load(selection("p1"))
            await world.parts.adapters.unload(selection("p1"))
            world.sources.contents["p1"] = fetched("edited", version="2")
            await ask
            listed = await world.list()
            assert listed["p1"]["content_digest"] == "content of edited"
            assert listed["p2"]["content_digest"] == "content of x"


@in_loop
async def test_what_left_the_disk_is_fetched_again_for_the_request():
    async with adapter_world() as world:
        await world.generate("a")
        await world.parts.adapters.unload(selection("a"))
        gone = [AdapterUnavailableError(Reason.EVICTED, "its files are gone")]

        def prepare(handle: AdapterHandle, content: object) -> None:
            if gone:
                raise gone.pop()

        world.shard.on_prepare = prepare
        assert len((await world.generate("a")).sequences[0].tokens.ids) == 3
        assert [query.refresh for query in world.shard.queries] == [False, False, True]


@in_loop
async def test_a_content_that_left_the_disk_and_its_source_fails_in_words_and_then_is_the_new():
    async with adapter_world() as world:
        evicted = AdapterUnavailableError(Reason.EVICTED, "its files are gone")

        def prepare(handle: AdapterHandle, content: object) -> None:
            if handle == 1:
                world.sources.contents["a"] = fetched("new")
                raise evicted

        world.shard.on_prepare = prepare
        with pytest.raises(AdapterUnavailableError, match="replaced at its source") as raised:
            await world.generate("a")
        assert raised.value.kind.http_status == 424
        await world.generate("a")
        assert world.handle("a") == 2
        await world.gone(AdapterHandle(1))


@in_loop
async def test_a_content_that_is_evicted_again_and_again_is_given_up():
    async with adapter_world() as world:

        def prepare(handle: AdapterHandle, content: object) -> None:
            raise AdapterUnavailableError(Reason.EVICTED, "its files are gone")

        world.shard.on_prepare = prepare
        with pytest.raises(AdapterUnavailableError, match="its files are gone"):
            await world.generate("a")
        assert len(world.shard.queries) == 3
