"""Every implementation of ShardClient, each over FakeShards."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.fake_shard_server import serve

from lorax_router.core.ports import ShardClient
from lorax_router.shards.fake.shard import FakeShard
from lorax_router.shards.group import ShardGroup
from lorax_router.shards.grpc_client import CallTimeouts, GrpcShardClient

TIMEOUTS = CallTimeouts(reconnect_s=0.3)


class JitteryShard:
    """Passes calls on after a random moment, so that they arrive out of order."""

    def __init__(self, shard: FakeShard, rng: random.Random) -> None:
        self._shard = shard
        self._rng = rng

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._shard, name)

        async def call(*args: object) -> Any:
            await asyncio.sleep(self._rng.uniform(0, 0.005))
            return await method(*args)

        return call


@dataclass
class Kind:
    """One implementation over ``num_ranks`` FakeShards."""

    name: str
    num_ranks: int
    client: Callable[..., contextlib.AbstractAsyncContextManager[ShardClient]]

    @contextlib.asynccontextmanager
    async def open(
        self, *, jitter_seed: int | None = None, **options: Any
    ) -> AsyncIterator[tuple[ShardClient, list[FakeShard]]]:
        """Yield a client and the ranks behind it, made with ``options``."""
        world = self.num_ranks
        shards = [FakeShard(rank=rank, world_size=world, **options) for rank in range(world)]
        jitter = None if jitter_seed is None else random.Random(jitter_seed)
        async with self.client(shards, jitter) as client:
            await client.info()
            yield client, shards


def _jittery(shards: list[FakeShard], jitter: random.Random | None) -> list[Any]:
    return [JitteryShard(shard, jitter) for shard in shards] if jitter else shards


@contextlib.asynccontextmanager
async def _fake(shards, jitter):
    (client,) = _jittery(shards, jitter)
    yield client
    await client.close()


@contextlib.asynccontextmanager
async def _group(shards, jitter):
    group = ShardGroup(_jittery(shards, jitter))
    yield group
    await group.close()


@contextlib.asynccontextmanager
async def _grpc(shards, jitter):
    with tempfile.TemporaryDirectory() as folder:
        async with serve(shards, Path(folder), jitter) as uris:
            client = GrpcShardClient(uris[0], timeouts=TIMEOUTS)
            yield client
            await client.close()


@contextlib.asynccontextmanager
async def _grpc_group(shards, jitter):
    with tempfile.TemporaryDirectory() as folder:
        async with serve(shards, Path(folder), jitter) as uris:
            group = await ShardGroup.connect(uris[0], timeouts=TIMEOUTS)
            yield group
            await group.close()


KINDS = [
    Kind("fake", 1, _fake),
    *(Kind(f"group-{n}", n, _group) for n in (1, 2, 3)),
    Kind("grpc", 1, _grpc),
    *(Kind(f"grpc-group-{n}", n, _grpc_group) for n in (1, 2, 3)),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture(params=[k for k in KINDS if "group" in k.name], ids=lambda kind: kind.name)
def group_kind(request: pytest.FixtureRequest) -> Kind:
    return request.param
