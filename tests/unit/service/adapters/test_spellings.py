"""One folder is one name, however callers spell it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched, selection
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import (
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    Reason,
)
from lorax_router.service.adapters.selection import place_key
from lorax_router.service.requests import MergedAdapters

SPELLINGS = ["pirate", "./pirate", "pirate/", "/roots/pirate", "//roots//pirate/", "././pirate/."]


def rooted(world: AdapterWorld) -> None:
    """Answer as a source with one root does."""

    def fetch(query: AdapterQuery) -> FetchedAdapter:
        name = query.ref.id.removeprefix("/roots/")
        if name == "none":
            raise AdapterUnavailableError(Reason.NOT_FOUND, "is no folder")
        return replace(fetched(name), id=name)

    world.shard.on_fetch = fetch


@pytest.mark.parametrize(
    ("source", "given", "plain"),
    [
        ("local", "a/b", "a/b"),
        ("local", "./a//b/./", "a/b"),
        ("local", "/a", "/a"),
        ("local", "//a/", "/a"),
        ("local", "///a", "/a"),
        ("local", ".", "."),
        # What may lead elsewhere is refused by its source, in the caller's words.
        ("local", "a/../b", "a/../b"),
        ("local", "a..b", "a..b"),
        ("s3", "bucket/prefix", "s3://bucket/prefix"),
        ("s3", "s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3", "bucket/a//b", "s3://bucket/a//b"),
        ("hub", "./a/", "./a/"),
    ],
)
def test_what_means_nothing_is_left_out_of_a_name(source, given, plain):
    ref = AdapterRef.of(source, given, "v1")
    assert ref.plain == AdapterRef.of(source, plain, "v1")
    assert ref.plain.plain == ref.plain


@in_loop
async def test_all_spellings_of_a_folder_are_one_name_in_lists_and_metrics():
    async with adapter_world() as world:
        rooted(world)
        for spelling in SPELLINGS:
            answer = await world.client.post(
                "/generate",
                json={
                    "inputs": "w1",
                    "parameters": {
                        "adapter_id": spelling,
                        "adapter_source": "local",
                        "max_new_tokens": 1,
                    },
                },
            )
            # The caller hears of what it asked for.
            assert answer.headers["x-adapter-id"] == spelling
        listed = await world.list()
        assert listed.keys() == {"pirate"}
        assert listed["pirate"]["uses"] == len(SPELLINGS)
        samples = await world.metrics()
        assert samples['lorax_adapter_request_count{adapter="pirate"}'] == len(SPELLINGS)
        assert not any("./pirate" in name or "/roots" in name for name in samples)
        # Each new spelling that only the source can read is asked for, once.
        assert [query.ref.id for query in world.shard.queries] == ["pirate", "/roots/pirate"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_adapter_is_managed_and_found_by_any_of_its_spellings(spelling):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            rooted(world)
            adapters = world.parts.adapters
            document = await adapters.load(selection(spelling))
            assert document["adapter_id"] == "pirate"
            assert (await adapters.pin(selection(spelling)))["pinned"]
            assert (await world.list())["pirate"]["pinned"]
            assert not (await adapters.unpin(selection("pirate")))["pinned"]
            assert (await adapters.reload(selection(spelling)))["adapter_id"] == "pirate"
            answer = await world.client.get("/v1/adapters", params={"adapter_id": "./pirate/"})
            assert [each["adapter_id"] for each in answer.json()["adapters"]] == ["pirate"]
            assert (await adapters.unload(selection(spelling)))["adapter_id"] == "pirate"
            assert await world.list() == {}

    scene()


@in_loop
async def test_places_know_an_adapter_by_all_that_it_is_called():
    async with adapter_world() as world:
        rooted(world)
        adapters = world.parts.adapters
        for spelling in SPELLINGS:
            await adapters.load(selection(spelling))
        (entry,) = adapters._catalog.by_handle.values()
        known = set(adapters.place_keys([entry.handle]))
        assert known == {place_key(selection(each), lambda name: None) for each in SPELLINGS}


@in_loop
async def test_a_spelling_that_comes_to_mean_another_folder_is_asked_again():
    async with adapter_world() as world:
        meant = {"/roots/a": "a"}

        def fetch(query: AdapterQuery) -> FetchedAdapter:
            name = meant.get(query.ref.id, query.ref.id)
            return replace(fetched(name, valid_s=0), id=name)

        world.shard.on_fetch = fetch
        await world.generate("/roots/a")
        meant["/roots/a"] = "/roots/a"
        await world.generate("/roots/a")
        assert (await world.list()).keys() == {"a", "/roots/a"}
        meant["/roots/a"] = "b"
        await world.generate("/roots/a")
        assert "b" in await world.list()


@in_loop
async def test_failures_of_all_spellings_are_one_line():
    async with adapter_world() as world:
        rooted(world)
        for spelling in ("none", "./none", "none/", "none//"):
            with pytest.raises(AdapterUnavailableError):
                await world.generate(spelling)
        assert (await world.list()).keys() == {"none"}


@in_loop
async def test_parts_of_a_merge_are_found_by_any_spelling():
    async with adapter_world() as world:
        rooted(world)
        for ids in (["a", "b"], ["./a", "/roots/b"]):
            await world.generate(None, merged_adapters=MergedAdapters(ids=ids, weights=[1.0, 1.0]))
        assert (await world.list()).keys() == {"a", "b", "merged:a+b"}
