"""Which group of shards comes after one that is lost."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from lorax_contract.errors import ShardError, ShardUnavailableError
from lorax_contract.step import WarmupSpec
from lorax_router.shards import connecting
from lorax_router.shards.fake.shard import FakeShard
from lorax_router.shards.group import ShardGroup
from lorax_router.shards.grpc_client import CallTimeouts

SPEC = WarmupSpec(max_input_length=10, max_total_tokens=20, max_step_tokens=16, max_rows=4)


class Hangs(FakeShard):
    """Never becomes warm."""

    async def warmup(self, spec: WarmupSpec, epoch: int | None = None) -> int:
        raise ShardUnavailableError("no answer within 60 s")


class TooSmall(FakeShard):
    """Has no room."""

    async def warmup(self, spec: WarmupSpec, epoch: int | None = None) -> int:
        raise ShardError("no room for a KV cache")


def come(monkeypatch: pytest.MonkeyPatch, *shards: FakeShard) -> None:
    """Let these answer, one after the other; the last one goes on to."""
    coming = list(shards)

    async def connect(
        uri: str, timeouts: CallTimeouts, tls: None = None, *, wait_s: float = 0.0
    ) -> ShardGroup:
        return ShardGroup([coming.pop(0) if len(coming) > 1 else coming[0]])

    monkeypatch.setattr(connecting, "connect", connect)
    monkeypatch.setattr(connecting, "_RETRY_S", 0.001)


def following(epoch: int, wait_s: float = 5.0) -> Any:
    """Return the session that comes after an epoch."""
    wanted = connecting.next_session("unix:x", CallTimeouts(), None, SPEC, epoch, wait_s=wait_s)
    return asyncio.run(asyncio.wait_for(wanted, 10))


def test_a_group_that_is_the_lost_one_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    come(monkeypatch, FakeShard(epoch=1), FakeShard(epoch=1), FakeShard(epoch=2, num_blocks=7))
    session = following(1)
    assert (session.info.epoch, session.num_blocks) == (2, 7)


def test_a_group_that_hangs_as_it_warms_up_is_told_of_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever started it reads of it, and kills it."""
    come(monkeypatch, Hangs(epoch=2), FakeShard(epoch=2), FakeShard(epoch=3))
    with caplog.at_level(logging.ERROR):
        assert following(1).info.epoch == 3
    (record,) = caplog.records
    assert vars(record)["fields"] == {
        "event": "shards_lost", "epoch": 2, "reason": "rank 0 of 1: no answer within 60 s"
    }  # fmt: skip


def test_a_group_that_serves_another_router_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has there would go."""
    shard = FakeShard(epoch=2)
    asyncio.run(shard.warmup(SPEC, 2))
    come(monkeypatch, shard)
    with pytest.raises(ShardError, match="another router"):
        following(1)


def test_where_none_comes_in_time_the_last_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    come(monkeypatch, FakeShard(epoch=4))
    with pytest.raises(ShardUnavailableError, match="those that failed"):
        following(4, wait_s=0.02)


def test_a_group_that_has_no_room_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    come(monkeypatch, TooSmall(epoch=2))
    with pytest.raises(ShardError, match="no room"):
        following(1)
