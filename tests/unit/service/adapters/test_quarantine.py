"""An adapter whose rows have no numbers again and again is let in no more, and says why."""

from __future__ import annotations

import asyncio

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, selection
from tests.helpers.log_events import events_in

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_contract.errors import GenerationError, NoNumbersError
from lorax_contract.step import NO_NUMBERS_CODE, RequestId


class Rows:
    """Makes the next rows of a world fail, or not."""

    def __init__(self, world: AdapterWorld) -> None:
        self.world = world
        self.num = 0

    async def fails(self, adapter: str | None, code: str = NO_NUMBERS_CODE) -> GenerationError:
        self.num += 1
        self.world.shard.fail_row(RequestId(self.num), "no finite numbers", code=code)
        with pytest.raises(GenerationError) as caught:
            await self.world.generate(adapter)
        return caught.value

    async def succeeds(self, adapter: str | None) -> None:
        self.num += 1
        await self.world.generate(adapter)


def test_the_error_of_a_row_without_numbers_names_its_adapter() -> None:
    async def scene() -> None:
        async with adapter_world() as world:
            rows = Rows(world)
            error = await rows.fails("poet")
            assert isinstance(error, NoNumbersError)
            assert "no finite numbers (adapter poet)" in error.public
            assert "(adapter" not in (await rows.fails(None)).public
            assert "(adapter" not in (await rows.fails("poet", code="generation")).public

    asyncio.run(scene())


def test_three_one_after_the_other_are_too_many_and_a_load_by_hand_tries_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scene() -> None:
        async with adapter_world() as world:
            rows = Rows(world)
            for _ in range(3):
                await rows.fails("poet")
            with pytest.raises(AdapterUnavailableError, match="load it again") as caught:
                await world.generate("poet")
            assert caught.value.reason is Reason.QUARANTINED
            listed = (await world.list())["poet"]
            assert listed["failure"]["reason"] == "quarantined"
            assert "last 3 requests" in listed["failure"]["text"]
            assert (await world.metrics())["lorax_adapter_quarantines"] == 1
            (event,) = events_in(caplog, "adapter_quarantined")
            assert (event["adapter"], event["seconds"]) == ("poet", 600)
            assert "last 3 requests" in event["reason"]
            # Nobody else is.
            await rows.succeeds("other")
            await rows.succeeds(None)
            await world.parts.adapters.load(selection("poet"))
            assert (await world.list())["poet"]["failure"] is None
            await rows.succeeds("poet")

    asyncio.run(scene())


@pytest.mark.parametrize("by", ["time", "other shards"])
def test_it_does_not_last(by: str) -> None:
    """Of what was wrong the shards may have been the cause, or whoever asked."""

    async def scene() -> None:
        async with adapter_world() as world:
            rows = Rows(world)
            directory = world.parts.adapters.directory
            for _ in range(3):
                await rows.fails("poet")
            with pytest.raises(AdapterUnavailableError) as first:
                await world.generate("poet")
            with pytest.raises(AdapterUnavailableError) as second:
                await world.generate("poet")
            # One that is raised again and again holds on to all that it has passed.
            assert first.value is not second.value
            if by == "time":
                later = directory._clock() + 601
                directory._clock = lambda: later
            else:
                directory.shards_lost()
            await rows.succeeds("poet")

    asyncio.run(scene())


def test_a_row_that_ends_well_in_between_takes_the_blame_away() -> None:
    """So do other faults not count: they are no matter of its weights."""

    async def scene() -> None:
        async with adapter_world() as world:
            rows = Rows(world)
            for _ in range(2):
                await rows.fails("poet")
            await rows.succeeds("poet")
            for _ in range(2):
                await rows.fails("poet")
            for _ in range(3):
                await rows.fails("other", code="generation")
            await rows.succeeds("poet")
            await rows.succeeds("other")

    asyncio.run(scene())
