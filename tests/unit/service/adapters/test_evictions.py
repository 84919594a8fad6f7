"""Each adapter that leaves the shards is an event in the log, and counted by why it did."""

from __future__ import annotations

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world, selection
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop
from tests.helpers.log_events import events_in

from lorax_contract.adapters import AdapterUnavailableError, Reason
from lorax_contract.step import AdapterHandle


async def counted(world: AdapterWorld) -> tuple[float, float]:
    found = await world.metrics()
    room, unloaded = (
        f'lorax_adapter_evictions{{reason="{each}"}}' for each in ("room", "unloaded")
    )
    return found[room], found[unloaded]


@in_loop
async def test_one_that_makes_room_and_one_that_is_unloaded(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    async with adapter_world(max_active_adapters=1) as world:
        await world.generate("poet")
        assert await counted(world) == (0, 0)
        await world.generate("pirate")
        await until(lambda: events_in(caplog, "adapter_evicted"))
        assert await counted(world) == (1, 0)
        await world.parts.adapters.unload(selection("pirate"))
        await until(lambda: len(events_in(caplog, "adapter_evicted")) == 2)
        assert await counted(world) == (1, 1)
    found = [(each["adapter"], each["reason"]) for each in events_in(caplog, "adapter_evicted")]
    assert found == [("poet", "room"), ("pirate", "unloaded")]


@in_loop
async def test_one_that_never_came_does_not_leave(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    async with adapter_world() as world:
        released = []

        async def prepare(handle: AdapterHandle, content: object) -> None:
            raise AdapterUnavailableError(Reason.CORRUPT, "its header is cut off")

        async def release(handle: AdapterHandle, epoch: int | None = None) -> None:
            released.append(handle)

        world.shard.on_prepare = prepare
        world.shard.release_adapter = release  # type: ignore[method-assign]
        with pytest.raises(AdapterUnavailableError):
            await world.generate("poet")
        # On some rank it might be.
        await until(lambda: released)
        assert await counted(world) == (0, 0)
        assert not events_in(caplog, "adapter_evicted")
