"""An engine loop over shards that die and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tests.helpers.adapter_world import DirectExecutor

from lorax_contract.errors import ShardError
from lorax_contract.step import (
    AdapterHandle,
    RequestSpec,
    SamplingParams,
    StoppingParams,
    WarmupSpec,
)
from lorax_router.core.adapters.table import AdapterTable
from lorax_router.core.ports import ShardSession
from lorax_router.core.scheduler import Scheduler
from lorax_router.service.engine.loop import EngineLoop
from lorax_router.service.metrics.recorder import Metrics
from lorax_router.shards.fake.shard import FakeModel, FakeShard
from lorax_router.shards.sessions import ShardSessions

BLOCKS, BLOCK_SIZE = 60, 4
ADAPTERS = 3
WARMUP = WarmupSpec(max_input_length=100, max_total_tokens=200, max_step_tokens=64, max_rows=8)


class MortalShards:
    """A loop over a FakeShard that is killed and comes back."""

    def __init__(self, depth: int) -> None:
        self.shard = FakeShard(
            FakeModel(vocab_size=97), num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_depth=depth
        )
        self.is_back = asyncio.Event()
        self.is_back.set()
        self.failure: ShardError | None = None
        self.depth = depth
        self.metrics = Metrics(model_name="fake", max_input_length=100, max_total_tokens=200)

    async def start(self) -> None:
        self.sessions = ShardSessions(await self._session(), self._connect)
        adapters = AdapterTable(max_resident=2)
        scheduler = Scheduler(
            num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_step_tokens=64, max_rows=8,
            depth=self.depth, adapters=adapters,
        )  # fmt: skip
        self.loop = EngineLoop(
            self.sessions, scheduler, sessions=self.sessions,
            adapters=DirectExecutor(self.sessions), least_hang_s=0.2, observer=self.metrics,
        )  # fmt: skip
        for handle in range(1, ADAPTERS + 1):
            self.loop.add_adapter(AdapterHandle(handle), 1)
        self.sessions.watch()
        self.running = asyncio.create_task(self.loop.run())

    async def _session(self) -> ShardSession:
        self.shard.reconnect()
        num_blocks = await self.shard.warmup(WARMUP)
        return ShardSession(self.shard, await self.shard.info(), num_blocks)

    async def _connect(self, epoch: int) -> ShardSession:
        await self.is_back.wait()
        if self.failure is not None:
            raise self.failure
        assert self.shard.epoch > epoch
        return await self._session()

    def kill(self) -> None:
        self.is_back.clear()
        self.shard.die()

    def bring_back(self) -> None:
        self.shard.restart()
        self.is_back.set()

    def spec(self, num: int, adapter: int = 0, seed: int | None = None) -> RequestSpec:
        sampling = SamplingParams() if seed is None else SamplingParams(do_sample=True, seed=seed)
        return RequestSpec(
            request_id=self.loop.new_request_id(),
            prompt_ids=[1 + adapter, 2, 3 + num % 7],
            sampling=sampling,
            stopping=StoppingParams(max_new_tokens=num, ignore_eos=True),
            adapter=AdapterHandle(adapter),
        )

    async def read(self, spec: RequestSpec) -> None:
        """Read a stream to its end; it is what it would have been without any loss."""
        stream = self.loop.submit(spec)
        found = [token async for chunk in stream for token in chunk.tokens.ids]
        assert found == self.shard.model.expected_tokens(spec)

    def sample(self, name: str) -> float:
        """Return a metric that has no labels."""
        value = self.metrics.registry.get_sample_value(name)
        assert value is not None
        return value

    async def stop(self) -> None:
        assert not self.shard.violations
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.sessions.close()


def play(scene: Callable[[MortalShards], Awaitable[None]], depth: int = 2) -> None:
    """Run a scene from a start of the loop to its end, in a minute at most."""

    async def run() -> None:
        world = MortalShards(depth)
        await world.start()
        async with asyncio.timeout(60):
            await scene(world)
        await world.stop()

    asyncio.run(run())
