"""Names of the operator's own choosing: what they lead to, who shares it, when they go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched, selection
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterQuery, AdapterUnavailableError, Reason, refused
from lorax_contract.errors import StartupError, ValidationError
from lorax_contract.step import AdapterHandle
from lorax_router.adapter_setup import preload
from lorax_router.service.adapters.aliases import Alias, AliasBook
from lorax_router.service.requests import MergedAdapters

POET = ["poet=local:a"]


def used(world: AdapterWorld) -> list[AdapterHandle]:
    """The handle of each request that entered a step, in order."""
    return [row.spec.adapter for plan in world.shard.steps for row in plan.new_rows]


async def by_name(world: AdapterWorld, name: str = "poet", **params: Any) -> Any:
    """Generate by a name and no source, as a client does that knows of none."""
    return await world.generate(name, adapter_source=None, **params)


@in_loop
async def test_an_alias_is_a_name_like_any_other_and_shares_its_content():
    async with adapter_world(adapter_aliases=POET) as world:
        await by_name(world)
        await world.generate("a")
        assert used(world) == [1, 1]
        assert list(world.shard.prepared) == [1]
        assert world.sources.contents == {}
        listed = await world.list()
        assert (listed["poet"]["adapter_source"], listed["poet"]["alias_of"]) == (
            "alias",
            "local:a",
        )
        assert (listed["a"]["adapter_source"], listed["a"]["alias_of"]) == ("local", None)
        assert {each["state"] for each in listed.values()} == {"resident"}
        # Sources know nothing of aliases.
        assert {query.ref.source for query in world.shard.queries} == {"local"}


@in_loop
async def test_an_alias_wins_over_an_id_unless_the_request_names_a_source():
    async with adapter_world(adapter_aliases=["b=local:a"]) as world:
        await by_name(world, "b")
        await world.generate("b", adapter_source="local")
        await world.generate("b", adapter_source="alias")
        assert used(world) == [1, 2, 1]
        with pytest.raises(ValidationError, match="has no revisions"):
            await world.generate("b", adapter_source="alias", revision="v1")


@in_loop
async def test_a_request_by_alias_is_under_its_label_in_headers_logs_and_metrics(caplog):
    async with adapter_world(adapter_aliases=POET) as world:
        body = {"inputs": "w1", "parameters": {"adapter_id": "poet", "max_new_tokens": 2}}
        caplog.set_level("INFO", "lorax_router.request")
        answer = await world.client.post("/generate", json=body)
        assert answer.headers["x-adapter-id"] == "poet"
        assert answer.headers["x-adapter-source"] == "alias"
        assert caplog.records[-1].fields["adapter"] == "poet"
        samples = await world.metrics()
        assert samples['lorax_adapter_request_count{adapter="poet"}'] == 1
        assert samples['lorax_adapter_resident{adapter="poet"}'] == 1


@in_loop
async def test_merges_take_aliases():
    async with adapter_world(adapter_aliases=POET) as world:
        merged = MergedAdapters(ids=["poet", "poet"], weights=[1.0, 1.0])
        result = await by_name(world, None, merged_adapters=merged)
        assert result.adapter.label == "merged:poet+poet"


@in_loop
async def test_what_the_operators_token_opened_is_for_everybody_who_gives_the_name():
    asked: list[AdapterQuery] = []

    async with adapter_world() as world:

        def source(query: AdapterQuery) -> Any:
            asked.append(query)
            if query.token != "operators":
                raise AdapterUnavailableError(Reason.NO_ACCESS, "not for you")
            return fetched("secret", access="token")

        world.shard.on_fetch = source
        loaded = await world.admin.post(
            "/v1/adapters/load",
            json={"adapter_id": "org/x", "api_token": "operators", "alias": "poet"},
        )
        assert loaded.status_code == 200
        await by_name(world)
        await by_name(world, token="somebodys")
        assert (await world.list())["poet"]["state"] == "resident"
        with pytest.raises(AdapterUnavailableError):
            await world.generate("org/x", adapter_source="hub")
        assert "operators" not in repr(asked)


@in_loop
async def test_unloading_an_alias_leaves_what_other_names_use():
    async with adapter_world(adapter_aliases=["poet=local:a", "bard=local:a"]) as world:
        await by_name(world, "poet")
        await by_name(world, "bard")
        answer = (await world.admin.post("/v1/adapters/unload", json={"adapter_id": "poet"})).json()
        assert answer["shared_with"] == ["alias:bard"]
        assert answer["freed"] == {"device": 0, "host": 0, "disk": 0}
        assert set(await world.list()) == {"bard"}
        answer = (await world.admin.post("/v1/adapters/unload", json={"adapter_id": "bard"})).json()
        assert answer["freed"]["device"] > 0
        assert await world.list() == {}
        # The names mean nothing any more.
        world.sources.contents["poet"] = AdapterUnavailableError(Reason.NOT_FOUND, "no such id")
        with pytest.raises(AdapterUnavailableError, match="no such id"):
            await by_name(world, "poet")


@in_loop
async def test_an_alias_whose_adapter_never_came_can_be_taken_back():
    async with adapter_world(adapter_aliases=POET) as world:
        world.sources.contents["a"] = refused("its peft_type is not served")
        with pytest.raises(AdapterUnavailableError):
            await by_name(world)
        assert (await world.list())["poet"]["state"] == "refused"
        answer = await world.admin.post("/v1/adapters/unload", json={"adapter_id": "poet"})
        assert answer.status_code == 200
        assert await world.list() == {}


@in_loop
async def test_what_left_the_disk_is_had_again_after_the_name_of_the_last_request_was_taken_back():
    async with adapter_world(adapter_aliases=POET, max_active_adapters=1) as world:
        world.shard.step_delay_s = 0.001
        stream = await world.stream("b", 150)
        lost = True

        def prepare(handle: object, content: Any) -> None:
            nonlocal lost
            if lost and content.key == "content of a":
                lost = False
                raise AdapterUnavailableError(Reason.EVICTED, "its files are gone")

        world.shard.on_prepare = prepare
        waiting = world.task("a")
        await until(lambda: len(world.catalog.by_handle) == 2)
        named = asyncio.create_task(by_name(world))
        handle = world.handle("a")
        await until(lambda: world.catalog.by_handle[handle].num_leases == 2)
        await world.admin.post("/v1/adapters/unload", json={"adapter_id": "poet"})
        await world.finish(stream)
        await asyncio.gather(waiting, named)
        assert not lost


@in_loop
async def test_a_name_given_anew_lets_running_requests_finish_and_keeps_its_pin():
    async with adapter_world() as world:
        world.shard.step_delay_s = 0.001
        await world.post("load", adapter_id="a", alias="poet", pin=True)
        old = world.handle("poet", "alias")
        stream = await world.parts.service.generate_stream(
            world.request("poet", 100, adapter_source=None)
        )
        await anext(stream)
        answer = await world.post("load", adapter_id="b", alias="poet")
        assert (answer.json()["alias_of"], answer.json()["pinned"]) == ("local:b", True)
        new = world.handle("poet", "alias")
        assert new != old
        await by_name(world)
        assert world.state(old) == "resident"
        assert await world.finish(stream) == 100
        await world.gone(old)
        assert used(world) == [old, new]


@pytest.mark.parametrize("stage", ["fetch", "prepare"])
def test_a_name_stays_as_it_is_when_its_new_adapter_cannot_be_had(stage):
    @in_loop
    async def scene():
        async with adapter_world(adapter_aliases=POET) as world:
            await by_name(world)
            if stage == "fetch":
                world.sources.contents["b"] = refused("its peft_type is not served")
            else:

                def prepare(handle: object, content: Any) -> None:
                    if content.key == "content of b":
                        raise refused("it has NaN")

                world.shard.on_prepare = prepare
            for name in ("poet", "bard"):
                answer = await world.post("load", adapter_id="b", alias=name)
                assert answer.status_code == 422
            await until(lambda: len(world.catalog.by_handle) == 1)
            listed = await world.list()
            assert set(listed) == {"poet"}
            assert listed["poet"]["alias_of"] == "local:a"
            await by_name(world)
            assert set(used(world)) == {1}

    scene()


@in_loop
async def test_a_late_answer_about_what_a_name_stood_for_does_not_lead_it_back():
    async with adapter_world(adapter_aliases=POET) as world:
        slow: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        world.sources.contents["a"] = slow
        early = asyncio.create_task(by_name(world))
        await until(lambda: world.shard.queries)
        await world.post("load", adapter_id="b", alias="poet")
        slow.set_result(fetched("a"))
        await early
        assert (await world.list())["poet"]["content_digest"] == "content of b"
        handle = world.handle("poet", "alias")
        assert used(world) == [handle]


@in_loop
async def test_who_asked_before_a_name_was_taken_back_still_gets_it():
    async with adapter_world(adapter_aliases=POET) as world:
        slow: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        world.sources.contents["a"] = slow
        early = asyncio.create_task(by_name(world))
        await until(lambda: world.shard.queries)
        answer = await world.admin.post("/v1/adapters/unload", json={"adapter_id": "poet"})
        assert answer.status_code == 200
        slow.set_result(fetched("a"))
        assert len((await early).sequences[0].tokens.ids) == 3
        await until(lambda: not world.catalog.by_handle)
        assert await world.list() == {}


@in_loop
async def test_reload_asks_for_what_the_name_stands_for():
    async with adapter_world(adapter_aliases=POET) as world:
        await by_name(world)
        world.sources.contents["a"] = fetched("newer", version="2")
        answer = await world.admin.post("/v1/adapters/reload", json={"adapter_id": "poet"})
        assert (answer.json()["changed"], answer.json()["version"]) == (True, "2")
        assert answer.json()["alias_of"] == "local:a"


@in_loop
async def test_names_of_the_start_are_loaded_and_stay():
    aliases = ["poet=local:a", "bard=local:b"]
    async with adapter_world(adapter_aliases=aliases, adapter_id="poet") as world:
        await preload(world.parts.adapters, world.parts.preloads)
        listed = await world.list()
        assert {name: each["pinned"] for name, each in listed.items()} == {
            "poet": True,
            "bard": True,
        }
        # The server's own adapter may be one of them.
        result = await world.generate(None)
        assert result.adapter.label == "poet"


@in_loop
async def test_one_that_cannot_be_loaded_ends_the_start_by_its_name():
    async with adapter_world(adapter_aliases=POET) as world:
        world.sources.contents["a"] = refused("its peft_type is not served")
        with pytest.raises(StartupError, match="adapter poet cannot be loaded: its peft_type"):
            await preload(world.parts.adapters, world.parts.preloads)


@pytest.mark.parametrize(
    ("aliases", "words"),
    [
        (["=local:a"], "must not be empty"),
        (["fake=local:a"], "'fake' is a name of the base model"),
        (["local:x=local:a"], "begins like the name of a source"),
        (["poet="], "empty"),
        (["poet=alias:bard"], "no adapter named 'bard'"),
        (["a\nb=local:a"], "control characters"),
    ],
)
def test_a_name_that_can_be_none_ends_the_start(aliases, words):
    @in_loop
    async def scene():
        with pytest.raises(StartupError, match=words):
            async with adapter_world(adapter_aliases=aliases):
                pass

    scene()


def test_an_alias_of_an_alias_stands_for_what_that_stands_for():
    book = AliasBook()
    book.put(book.make("poet", selection("a")))
    again = book.make("bard", Alias(name="poet", target=selection("a")).selection)
    assert again.target == selection("a")


def test_there_are_only_so_many_names(monkeypatch):
    monkeypatch.setattr("lorax_router.service.adapters.aliases._MAX_ALIASES", 2)
    book = AliasBook()
    for name in ("a", "b", "a"):
        book.put(book.make(name, selection("x")))
    with pytest.raises(ValidationError, match="as many as may be"):
        book.put(book.make("c", selection("x")))
