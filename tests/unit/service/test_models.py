"""What a request's model leads to, and what lists show can be asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, fetched, ref, selection
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterQuery, AdapterUnavailableError, Reason, refused
from lorax_contract.errors import ModelNotFoundError
from lorax_router.service.models import Models


def models_of(world: AdapterWorld) -> Models:
    """The one that the routes use."""
    return world.parts.models


@pytest.mark.parametrize("name", [None, "", "fake", "shown", "other", "__base_model__"])
def test_the_base_is_meant_by_all_its_names(name):
    @in_loop
    async def scene():
        async with adapter_world(served_model_names=["shown", "other"]) as world:
            assert models_of(world).resolve(name) == (None, None)
            # Clients that always send a source mean the base all the same.
            assert models_of(world).resolve(name, "hub") == (None, None)

    scene()


@pytest.mark.parametrize("name", ["dummy", "tgi"])
def test_what_clients_of_tgi_send_for_no_model_is_the_base_unless_something_is_called_so(name):
    @in_loop
    async def scene():
        async with adapter_world(served_model_names=["shown"]) as world:
            models = models_of(world)
            assert models.resolve(name) == (None, None)
            assert models.shown(name) == "shown"
            assert models.resolve(f"local:{name}") == (name, "local")
            assert models.resolve(name, "local") == (name, "local")
        async with adapter_world(adapter_aliases=[f"{name}=local:a"]) as world:
            assert models_of(world).resolve(name) == (name, "alias")
            assert models_of(world).shown(name) == name
        async with adapter_world(adapter_refusal="the base model only") as world:
            assert models_of(world).resolve(name) == (None, None)

    scene()


@pytest.mark.parametrize(
    ("model", "source", "found"),
    [
        ("org/x", None, ("org/x", "hub")),
        ("org/x@v2", None, ("org/x@v2", "hub")),
        ("org/x", "s3", ("org/x", "s3")),
        ("hub:org/x", None, ("org/x", "hub")),
        ("local:a/b", None, ("a/b", "local")),
        ("local:a/b", "LOCAL", ("a/b", "local")),
        ("/adapters/x", None, ("/adapters/x", "local")),
        ("s3://bucket/x", None, ("s3://bucket/x", "s3")),
        ("s3:bucket/x", None, ("bucket/x", "s3")),
        ("poet", None, ("poet", "alias")),
        ("alias:poet", None, ("poet", "alias")),
        ("poet", "hub", ("poet", "hub")),
    ],
)
def test_an_adapter_is_meant_by_the_native_routes_rules(model, source, found):
    @in_loop
    async def scene():
        async with adapter_world(adapter_aliases=["poet=local:a"]) as world:
            assert models_of(world).resolve(model, source) == found

    scene()


@pytest.mark.parametrize("model", ["a\nb", "x" * 600, "alias:nobody", "local:", "x@1@2\x7f"])
def test_what_can_be_no_name_is_no_model(model):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            with pytest.raises(ModelNotFoundError) as caught:
                models_of(world).resolve(model)
            assert len(str(caught.value)) < 400

    scene()


@in_loop
async def test_where_no_adapters_are_served_every_other_name_is_no_model():
    async with adapter_world(adapter_refusal="the base model only") as world:
        assert models_of(world).resolve("fake") == (None, None)
        with pytest.raises(ModelNotFoundError):
            models_of(world).resolve("org/x")


@pytest.mark.parametrize("reason", [Reason.NOT_FOUND, Reason.NO_ACCESS, Reason.OFFLINE])
def test_what_its_source_does_not_have_for_the_caller_is_no_model_in_the_same_words(reason):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            error = AdapterUnavailableError(reason, f"because of {reason.value}")
            world.sources.contents["org/x"] = error
            models = models_of(world)
            fields = models.resolve("org/x")
            with pytest.raises(ModelNotFoundError) as caught, models.asked_for("org/x"):
                await world.generate(fields.adapter_id, adapter_source=fields.adapter_source)
            assert str(caught.value) == (
                "there is no model 'org/x' that this request may use; GET /v1/models lists what is "
                "known"
            )

    scene()


@pytest.mark.parametrize(
    "error",
    [refused("its peft_type is not served"), AdapterUnavailableError(Reason.TRANSIENT, "down")],
)
def test_what_is_there_and_cannot_be_served_says_why(error):
    @in_loop
    async def scene():
        async with adapter_world() as world:
            world.sources.contents["org/x"] = error
            models = models_of(world)
            with (
                pytest.raises(AdapterUnavailableError, match=error.text),
                models.asked_for("org/x"),
            ):
                await world.generate("org/x", adapter_source="hub")

    scene()


@in_loop
async def test_what_is_listed_can_be_asked_for_and_leads_to_the_same():
    aliases = ["poet=s3://bucket/poet", "same=local:same"]
    async with adapter_world(adapter_aliases=aliases, default_adapter_source="hub") as world:
        for name, source in (
            ("org/x", "hub"), ("org/x@v1", "hub"), ("poet", "hub"), ("fake", "local"),
            ("a/b", "local"), ("/abs", "local"), ("bucket/y", "s3"), ("same", "local"),
        ):  # fmt: skip
            await world.generate(name, adapter_source=source)
        models = models_of(world)
        cards = await models.cards()
        ids = [card.id for card in cards]
        assert ids == [
            "fake", "poet", "same", "org/x", "org/x@v1", "hub:poet", "/abs", "local:a/b",
            "local:fake", "local:same", "s3://bucket/y",
        ]  # fmt: skip
        before = len(world.shard.queries)
        for card in cards[3:]:
            fields = models.resolve(card.id)
            await world.generate(fields.adapter_id, adapter_source=fields.adapter_source)
            assert await models.card(card.id) == card
        # All of them were known by these very names.
        assert len(world.shard.queries) == before
        for alias in ("poet", "same"):
            assert models.resolve(alias) == (alias, "alias")
            assert (await models.card(alias)).id == alias


@in_loop
async def test_cards_tell_root_parent_and_length():
    async with adapter_world(
        served_model_names=["shown", "other"],
        adapter_aliases=["poet=local:a"],
        max_total_tokens=200,
    ) as world:
        await world.generate("b")
        cards = {card.id: card for card in await models_of(world).cards()}
        assert {name: (card.root, card.parent) for name, card in cards.items()} == {
            "shown": ("fake", None),
            "other": ("fake", None),
            "poet": ("a", "shown"),
            "local:b": ("b", "shown"),
        }
        assert {card.max_model_len for card in cards.values()} == {200}
        assert all(card.created > 1.6e9 for card in cards.values())
        assert models_of(world).shown(None) == models_of(world).shown("") == "shown"
        assert models_of(world).shown("other") == "other"


@in_loop
async def test_names_that_lead_nowhere_are_not_listed():
    async with adapter_world() as world:
        world.sources.contents["bad"] = refused("no")
        with pytest.raises(AdapterUnavailableError):
            await world.generate("bad")
        assert [card.id for card in await models_of(world).cards()] == ["fake"]
        with pytest.raises(ModelNotFoundError):
            await models_of(world).card("local:bad")


@in_loop
async def test_anothers_private_adapter_is_in_no_list_and_no_card():
    async with adapter_world() as world:

        def source(query: AdapterQuery) -> Any:
            if query.ref.id == "org/hers" and query.token == "hers":
                return fetched("x", access="token")
            raise AdapterUnavailableError(Reason.NOT_FOUND, "is not on the hub")

        world.shard.on_fetch = source
        await world.generate("org/hers", adapter_source="hub", token="hers")
        models = models_of(world)
        assert [card.id for card in await models.cards("hers")] == ["fake", "org/hers"]
        assert (await models.card("org/hers", "hers")).root == "org/hers"
        for token in (None, "mine"):
            assert [card.id for card in await models.cards(token)] == ["fake"]
            words = []
            for name in ("org/hers", "org/none"):
                with pytest.raises(ModelNotFoundError) as caught:
                    await models.card(name, token)
                words.append(str(caught.value).replace(name, "it"))
            assert words[0] == words[1]


@in_loop
async def test_an_access_that_was_taken_back_is_not_listed():
    async with adapter_world() as world:
        opened = True

        def source(query: AdapterQuery) -> Any:
            if not opened:
                raise AdapterUnavailableError(Reason.NO_ACCESS, "not for you")
            return fetched("x", access="token", valid_s=0)

        world.shard.on_fetch = source
        await world.generate("org/hers", adapter_source="hub", token="hers")
        models = models_of(world)
        # It is old at once, so its source is asked again, and it is shown while that says yes.
        opened = False
        assert [card.id for card in await models.cards("hers")] == ["fake"]
        with pytest.raises(ModelNotFoundError):
            await models.card("org/hers", "hers")


@in_loop
async def test_many_names_are_listed_in_parts_between_which_others_run():
    async with adapter_world() as world:
        for num in range(1203):
            ref_id = f"a{num:04}"
            query = AdapterQuery(ref=ref(ref_id))
            await world.parts.adapters.directory.fetch(query)
            world.catalog.place(selection(ref_id), [fetched(ref_id)])
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        cards = await models_of(world).cards()
        turning.cancel()
        assert len(cards) == 1204
        assert turns >= 3
