"""Who may have an adapter, who may know of it, and for how long an answer holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import (
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    Reason,
)
from lorax_contract.errors import AdapterNotLoadedError
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.names import NameBook
from lorax_router.service.requests import MergedAdapters

NAME = "org/secret"
VERBS = ["pin", "unpin", "unload", "reload"]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Hub:
    """A source that lets callers in by name and token; everybody to names without tokens."""

    def __init__(self, world: AdapterWorld) -> None:
        self.world = world
        self.accepted: dict[str, set[str]] = {}
        self.trouble: AdapterUnavailableError | None = None
        world.shard.on_fetch = self.fetch

    def fetch(self, asked: AdapterQuery) -> FetchedAdapter:
        if self.trouble is not None:
            raise self.trouble
        tokens = self.accepted.get(asked.ref.id)
        if asked.ref.source != "hub" or tokens is None:
            return fetched(asked.ref.id)
        if asked.token not in tokens:
            raise AdapterUnavailableError(Reason.NO_ACCESS, "you are not let in")
        return fetched(asked.ref.id, access="token")

    async def generate(self, name: str = NAME, token: str | None = None, **params: Any) -> None:
        await self.world.generate(name, token=token, adapter_source="hub", **params)


def selected(name: str = NAME, token: str | None = None) -> AdapterSelection:
    return AdapterSelection(refs=(AdapterRef.of("hub", name),), token=token)


async def seen(world: AdapterWorld, token: str | None = None) -> dict[str, dict[str, Any]]:
    """The list over HTTP as a caller gets it."""
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    answer = await world.client.get("/v1/adapters", headers=headers)
    assert answer.status_code == 200
    return {each["adapter_id"]: each for each in answer.json()["adapters"]}


async def manage(world: AdapterWorld, verb: str, name: str, token: str | None) -> tuple[int, Any]:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    body = {"adapter_id": name, "adapter_source": "hub"}
    answer = await world.admin.post(f"/v1/adapters/{verb}", json=body, headers=headers)
    return answer.status_code, answer.json()


def set_clock(world: AdapterWorld) -> Clock:
    clock = Clock()
    world.catalog.names._clock = clock
    return clock


@in_loop
async def test_an_adapter_that_took_a_token_is_not_served_to_callers_without_that_access():
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted[NAME] = {"good", "better"}
        await hub.generate(token="good")
        for token in (None, "bad"):
            with pytest.raises(AdapterUnavailableError, match="not let in") as raised:
                await hub.generate(token=token)
            assert raised.value.kind.http_status == 422
        # Whoever was let in is remembered; another token is asked about, and shares the memory.
        await hub.generate(token="good")
        assert len(world.shard.queries) == 3
        await hub.generate(token="better")
        assert len(world.shard.queries) == 4
        assert list(world.shard.prepared) == [1]


@in_loop
async def test_a_token_that_lost_its_access_is_refused_once_the_answer_expires():
    async with adapter_world() as world:
        clock, hub = set_clock(world), Hub(world)
        hub.accepted[NAME] = {"good"}
        await hub.generate(token="good")
        hub.accepted[NAME] = set()
        clock.now = 299.0
        await hub.generate(token="good")
        clock.now = 301.0
        with pytest.raises(AdapterUnavailableError):
            await hub.generate(token="good")


@in_loop
async def test_answers_expire_and_are_everybodys_unless_a_token_was_taken():
    async with adapter_world() as world:
        clock, hub = set_clock(world), Hub(world)
        await hub.generate("org/open", token="any")
        await hub.generate("org/open")
        clock.now = 299.0
        await hub.generate("org/open", token="another")
        assert len(world.shard.queries) == 1
        clock.now = 300.0
        await hub.generate("org/open")
        assert len(world.shard.queries) == 2


@in_loop
async def test_an_adapter_that_becomes_private_is_nobodys_any_more():
    async with adapter_world() as world:
        hub = Hub(world)
        await hub.generate()
        assert (await seen(world))[NAME]["state"] == "resident"
        hub.accepted[NAME] = {"good"}
        await world.parts.adapters.load(selected(token="good"))
        for token in (None, "bad"):
            with pytest.raises(AdapterUnavailableError):
                await hub.generate(token=token)
            assert (await seen(world, token))[NAME]["state"] == "refused"
        await hub.generate(token="good")
        assert (await seen(world, "good"))[NAME]["state"] == "resident"


@in_loop
async def test_a_source_that_takes_no_token_is_asked_once_for_all_callers():
    async with adapter_world() as world:
        for token in (None, "a", "b"):
            await world.generate("a", token=token)
        assert [query.token for query in world.shard.queries] == [None]


@in_loop
async def test_tokens_are_in_no_log_line_list_or_error(caplog):
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted = {"a": {"s3cret"}, "b": {"s3cret"}}
        caplog.set_level("DEBUG")
        await hub.generate("a", token="s3cret")
        with pytest.raises(AdapterUnavailableError) as raised:
            await hub.generate("b", token="s3cret-too")
        shown = [raised.value.public, str(world.shard.queries)]
        shown += [str(await seen(world, token)) for token in (None, "s3cret", "s3cret-too")]
        shown += [str(record.__dict__) for record in caplog.records]
        assert "s3cret" not in "".join(shown)


# --- who may know of it -----------------------------------------------------------


@in_loop
async def test_a_private_adapter_is_listed_for_callers_whom_its_source_let_in_and_no_others():
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted[NAME] = {"good", "also good"}
        await hub.generate("org/open")
        await hub.generate(token="good")
        assert (await seen(world, "good")).keys() == {"org/open", NAME}
        for token in (None, "bad", "also good"):
            assert (await seen(world, token)).keys() == {"org/open"}
        await hub.generate(token="also good")
        assert (await seen(world, "also good"))[NAME]["uses"] == 2


@in_loop
async def test_what_a_stranger_asked_for_looks_the_same_whether_it_is_loaded_or_not():
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted = {NAME: {"good"}, "org/none": set()}
        await hub.generate(token="good")
        for token in (None, "bad"):
            for name in (NAME, "org/none"):
                with pytest.raises(AdapterUnavailableError):
                    await hub.generate(name, token=token)
            listed = await seen(world, token)
            hidden, unknown = listed.pop(NAME), listed.pop("org/none")
            assert listed == {}
            assert {**hidden, "adapter_id": ""} == {**unknown, "adapter_id": ""}
            assert hidden["failure"]["text"] == "you are not let in"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("token", [None, "bad"])
def test_a_hidden_adapter_and_an_unknown_one_are_answered_alike(verb, token):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            hub = Hub(world)
            hub.accepted = {NAME: {"good"}}
            await hub.generate(token="good")
            before = await seen(world, "good")
            status, hidden = await manage(world, verb, NAME, token)
            _, unknown = await manage(world, verb, "org/none", token)
            assert status == 404
            assert hidden["error"] == unknown["error"].replace("org/none", NAME)
            # Nothing was done, and nobody was asked.
            assert await seen(world, "good") == before
            assert len(world.shard.queries) == 1

    scene()


@pytest.mark.parametrize("verb", VERBS)
def test_a_private_adapter_is_managed_with_its_token(verb):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            hub = Hub(world)
            hub.accepted = {NAME: {"good"}}
            await hub.generate(token="good")
            status, document = await manage(world, verb, NAME, "good")
            assert status == 200
            assert document["adapter_id"] == NAME

    scene()


@pytest.mark.parametrize("verb", VERBS)
def test_a_token_that_lost_its_access_manages_and_sees_nothing(verb):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            clock, hub = set_clock(world), Hub(world)
            hub.accepted = {NAME: {"good", "better"}}
            await hub.generate(token="good")
            await hub.generate(token="better")
            clock.now = 301.0
            # It is asked for again, and opens still.
            assert NAME in await seen(world, "good")
            clock.now = 602.0
            hub.accepted[NAME] = {"better"}
            status, _ = await manage(world, verb, NAME, "good")
            assert status == (422 if verb == "reload" else 404)
            assert (await seen(world, "good"))[NAME]["content_digest"] is None
            assert (await seen(world, "better"))[NAME]["state"] == "resident"

    scene()


@in_loop
async def test_while_a_source_cannot_say_who_may_nobody_may():
    async with adapter_world() as world:
        clock, hub = set_clock(world), Hub(world)
        hub.accepted = {NAME: {"good"}}
        await hub.generate(token="good")
        clock.now = 301.0
        hub.trouble = AdapterUnavailableError(Reason.TRANSIENT, "the hub is down")
        assert await seen(world, "good") == {}
        status, document = await manage(world, "unload", NAME, "good")
        assert (status, document["error"]) == (424, "the hub is down")
        hub.trouble = None
        assert (await seen(world, "good"))[NAME]["state"] == "resident"


@in_loop
async def test_a_private_name_that_is_looked_up_is_nobody_elses_business():
    async with adapter_world() as world:
        world.sources.contents[NAME] = asyncio.get_running_loop().create_future()
        waiting = world.task(NAME, token="good", adapter_source="hub")
        await until(lambda: world.shard.queries)
        assert await seen(world) == {}
        assert (await seen(world, "good"))[NAME]["state"] == "resolving"
        assert NAME not in (await world.client.get("/metrics")).text
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert await seen(world, "good") == {}


@in_loop
async def test_metrics_count_private_adapters_together_and_name_none():
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted = {NAME: {"good"}, "org/other-secret": {"good"}}
        await hub.generate("org/open")
        for name in (NAME, "org/other-secret", NAME):
            await hub.generate(name, token="good")
        with pytest.raises(AdapterUnavailableError):
            await hub.generate(token="bad")
        text = (await world.client.get("/metrics")).text
        assert "secret" not in text
        samples = await world.metrics()
        assert samples['lorax_adapter_request_count{adapter="private"}'] == 3
        assert samples['lorax_adapter_generated_tokens{adapter="private"}'] == 9
        assert samples['lorax_adapter_request_count{adapter="other"}'] == 1
        assert samples['lorax_adapter_resident{adapter="private"}'] == 2
        assert samples['lorax_adapter_resident{adapter="org/open"}'] == 1
        assert samples['lorax_adapters{state="resident"}'] == 3


@in_loop
async def test_an_unload_names_those_it_shares_with_to_those_who_may_know():
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted = {NAME: {"good"}}

        def fetch(query: AdapterQuery) -> FetchedAdapter:
            return FetchedAdapter(
                **{
                    **{name: getattr(hub.fetch(query), name) for name in FetchedAdapter.__slots__},
                    "part": fetched("one").part,
                }
            )

        world.shard.on_fetch = fetch
        await hub.generate(token="good")
        for token, shared in ((None, []), ("good", [f"hub:{NAME}"])):
            await hub.generate("org/open", token=token)
            status, document = await manage(world, "unload", "org/open", token)
            assert (status, document["shared_with"]) == (200, shared)


@in_loop
async def test_a_merge_with_a_private_adapter_is_seen_by_those_who_see_all_of_it():
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted = {NAME: {"good"}}
        merged = MergedAdapters(ids=["org/open", NAME], weights=[1.0, 1.0])
        await world.generate(None, merged_adapters=merged, token="good", adapter_source="hub")
        label = f"merged:org/open+{NAME}"
        assert label in await seen(world, "good")
        for token in (None, "bad"):
            assert (await seen(world, token)).keys() == {"org/open"}
        assert "secret" not in (await world.client.get("/metrics")).text


@in_loop
async def test_a_private_adapter_that_was_replaced_and_still_runs_stays_hidden():
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted = {NAME: {"good"}}
        world.shard.step_delay_s = 0.001
        await hub.generate(token="good")
        request = world.request(NAME, 100, token="good", adapter_source="hub")
        stream = await world.parts.service.generate_stream(request)
        await anext(stream)
        unloading = asyncio.create_task(world.parts.adapters.unload(selected(token="good")))
        await until(lambda: world.catalog.names.find(selected().refs[0]) is None)
        assert await seen(world) == {}
        assert "secret" not in (await world.client.get("/metrics")).text
        await world.finish(stream)
        await unloading


@in_loop
async def test_unloading_a_private_adapter_frees_it_whoever_else_was_let_in():
    async with adapter_world() as world:
        hub = Hub(world)
        hub.accepted = {NAME: {"good", "better"}}
        await hub.generate(token="good")
        await hub.generate(token="better")
        document = await world.parts.adapters.unload(selected(token="good"))
        assert document["freed"]["device"] > 0
        with pytest.raises(AdapterNotLoadedError):
            await world.parts.adapters.unload(selected(token="better"))
        await hub.generate(token="better")
        assert len(world.shard.queries) == 3


def test_what_is_known_of_names_holds_no_token():
    book = NameBook(10, Clock(), lambda name: False, lambda name: None)
    ref = AdapterRef.of("hub", NAME)
    view = book.began(ref, "t0ken")
    book.answered(ref, "t0ken", fetched("x", access="token"))
    book.ended(view)
    assert book.answer(ref, "t0ken") is not None
    assert "t0ken" not in repr({**book.__dict__, "views": [name.views for name in book]})
