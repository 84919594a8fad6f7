"""Failures, releases and returns that are late meet nobody whom they do not concern."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from tests.helpers.adapter_world import AdapterWorld, adapter_world
from tests.helpers.http_app import until
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterUnavailableError, Reason, refused
from lorax_contract.errors import ShardError
from lorax_contract.step import (
    AdapterHandle,
    RequestId,
    RequestSpec,
    SamplingParams,
    StoppingParams,
)
from lorax_router.service.engine import orders
from lorax_router.service.results import GenerateResult

FIRST = AdapterHandle(1)


def expected(world: AdapterWorld, handle: int, num: int = 3) -> list[int]:
    """The tokens that an adapter gives alone for the prompt of AdapterWorld; 0 is the base."""
    spec = RequestSpec(
        request_id=RequestId(0),
        prompt_ids=[900, 1, 2],
        sampling=SamplingParams(),
        stopping=StoppingParams(max_new_tokens=num, ignore_eos=True),
        adapter=AdapterHandle(handle),
    )
    return world.shard.model.expected_tokens(spec)


def tokens(answer: GenerateResult) -> list[int]:
    """The tokens of an answer."""
    return answer.sequences[0].tokens.ids


def slow_release(world: AdapterWorld) -> asyncio.Event:
    """Have releases wait for an event."""
    freed, release = asyncio.Event(), world.shard.release_adapter

    async def slow(
        handle: AdapterHandle, forget: Sequence[object] = (), epoch: int | None = None
    ) -> None:
        await freed.wait()
        await release(handle, forget, epoch)  # type: ignore[arg-type]

    world.shard.release_adapter = slow  # type: ignore[method-assign]
    return freed


def failing(world: AdapterWorld, phase: str) -> asyncio.Future[None]:
    """Have the first adapter fail in one of its phases, once the future has the error."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def fail() -> None:
        # Whoever leaves takes nothing of it along.
        await asyncio.shield(future)

    if phase == "fetch":
        world.shard.on_fetch = lambda query: (
            fail() if query.ref.id == "broken" else world.sources(query)
        )
    else:
        world.shard.on_prepare = lambda handle, content: fail() if handle == FIRST else None
    return future


@pytest.mark.parametrize("num_turns", [None, 0, 1, 2, 3, 5])
@pytest.mark.parametrize("phase", ["fetch", "preparation"])
def test_w3_a_client_that_leaves_as_its_adapter_fails_ends_nothing_else(phase, num_turns):
    """LoRAX ends. The client leaves before the failure, or so many turns of the loop after it."""

    @in_loop
    async def scene():
        async with adapter_world() as world:
            future = failing(world, phase)
            leaver, stayer = world.task("broken"), world.task("broken")
            if phase == "preparation":
                await until(
                    lambda: (
                        world.state(FIRST) == "preparing" and world.table[FIRST].num_waiting == 2
                    )
                )
            else:
                await until(lambda: len(world.shard.queries) == 2)
            stream = await world.stream("good", 50)
            if num_turns is None:
                leaver.cancel()
                await asyncio.sleep(0)
            future.set_exception(refused("it is a pickle"))
            for _ in range(num_turns or 0):
                await asyncio.sleep(0)
            leaver.cancel()
            with pytest.raises((asyncio.CancelledError, AdapterUnavailableError)):
                await leaver
            with pytest.raises(AdapterUnavailableError, match="pickle"):
                await stayer
            assert await world.finish(stream) == 50
            assert tokens(await world.generate(None)) == expected(world, 0)

    scene()


@in_loop
async def test_w14_who_asks_for_an_adapter_whose_release_failed_hears_nothing_of_it(monkeypatch):
    """LoRAX keeps the error, and tells the next request."""
    monkeypatch.setattr(orders, "_RELEASE_PAUSES_S", (0.0,))
    async with adapter_world(max_active_adapters=1) as world:
        failures: list[Exception] = [ShardError("busy"), RuntimeError("odd")]

        def release(handle: AdapterHandle, forget: object) -> None:
            if failures:
                raise failures.pop()

        world.shard.on_release = release
        await world.generate("a")
        await world.generate("b")
        assert failures == []
        assert tokens(await world.generate("a")) == expected(world, world.handle("a"))


@in_loop
async def test_w15_a_request_that_comes_while_its_adapter_leaves_waits_for_its_return():
    """LoRAX schedules it at once, and may answer as the base model."""
    async with adapter_world(max_active_adapters=1) as world:
        await world.generate("a")
        freed = slow_release(world)
        other = world.task("b")
        await until(lambda: world.state(FIRST) == "releasing")
        again = world.task("a")
        await until(lambda: world.table[FIRST].num_waiting == 1)
        # Steps go on meanwhile, without it.
        assert tokens(await world.generate(None, 20)) == expected(world, 0, 20)
        assert not again.done()
        freed.set()
        await other
        assert tokens(await again) == expected(world, world.handle("a")) != expected(world, 0)


@in_loop
async def test_w16_a_failure_ends_those_who_waited_and_nobody_who_comes_after():
    """LoRAX tells it several times, the last times to requests that came meanwhile."""
    async with adapter_world() as world:
        future = failing(world, "preparation")
        freed = slow_release(world)
        early = [world.task("broken") for _ in range(3)]
        await until(
            lambda: world.state(FIRST) == "preparing" and world.table[FIRST].num_waiting == 3
        )
        future.set_exception(AdapterUnavailableError(Reason.TRANSIENT, "the disk is slow"))
        for task in early:
            with pytest.raises(AdapterUnavailableError, match="disk is slow"):
                await task
        # What is left of it on the shards is still being freed.
        world.shard.on_prepare = None
        late = [world.task("broken") for _ in range(3)]
        await until(lambda: world.table[FIRST].num_waiting == 3)
        await world.generate(None, 20)
        assert not any(task.done() for task in late)
        freed.set()
        for task in late:
            assert tokens(await task) == expected(world, world.handle("broken"))
