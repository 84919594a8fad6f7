"""From an address to the shard group that answers there, now or after a while."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from time import monotonic

from lorax_contract.errors import LoraxError, ShardError, ShardUnavailableError
from lorax_contract.step import WarmupSpec
from lorax_proto.mutual_tls import MutualTls
from lorax_router.core.ports import ShardSession
from lorax_router.shards.group import ShardGroup
from lorax_router.shards.grpc_client import CallTimeouts, GrpcShardClient

logger = logging.getLogger(__name__)

# Seconds between two tries to reach a shard that still loads its model.
_RETRY_S = 0.1


async def connect(
    uri: str, timeouts: CallTimeouts, tls: MutualTls | None = None, *, wait_s: float = 0.0
) -> ShardGroup:
    """Return the group whose rank 0 answers at ``uri`` within so many seconds, or raise why none."""
    with contextlib.suppress(TimeoutError, LoraxError):
        async with asyncio.timeout(wait_s):
            while not await _answers(uri, tls):  # noqa: ASYNC110 - another process sets no event
                await asyncio.sleep(_RETRY_S)
    return await ShardGroup.connect(uri, timeouts=timeouts, tls=tls)


async def _answers(uri: str, tls: MutualTls | None) -> bool:
    """Whether somebody does; what it answers is not looked at."""
    shard = GrpcShardClient(uri, timeouts=CallTimeouts(reconnect_s=0.0), tls=tls)
    try:
        await shard.health()
    except ShardUnavailableError:
        return False
    finally:
        await shard.close()
    return True


async def next_session(
    uri: str,
    timeouts: CallTimeouts,
    tls: MutualTls | None,
    spec: WarmupSpec,
    epoch: int,
    *,
    wait_s: float,
) -> ShardSession:
    """Return the session of the group that comes after ``epoch``, warmed up for ``spec``.

    Of one that is lost while it warms up the next one is waited for; one that another router has
    warmed up is that one's. Raises ShardError when
    none has come in ``wait_s`` seconds, or one that has no room.
    """
    deadline = monotonic() + wait_s
    while True:
        group = None
        try:
            group = await connect(uri, timeouts, tls, wait_s=max(deadline - monotonic(), 0.0))
            info = await group.info()
            if info.epoch > epoch:
                if info.num_blocks:
                    raise ShardError(f"another router serves with the shards at {uri} now")
                epoch = info.epoch
                return await _warmed_up(group, spec, epoch)
            error: ShardError = ShardUnavailableError(f"the shards at {uri} are those that failed")
        except ShardUnavailableError as gone:
            error = gone
        except BaseException:
            await _close(group)
            raise
        await _close(group)
        if monotonic() >= deadline:
            raise error
        await asyncio.sleep(_RETRY_S)


async def _warmed_up(group: ShardGroup, spec: WarmupSpec, epoch: int) -> ShardSession:
    """Warm a group up; of one that is lost by that whoever started it is told, by the log."""
    try:
        num_blocks = await group.warmup(spec)
        return ShardSession(group, await group.info(), num_blocks)
    except ShardUnavailableError as error:
        logger.error(
            "the shards are lost as they warm up: %s", error,
            extra={"fields": {"event": "shards_lost", "epoch": epoch, "reason": str(error)}},
        )  # fmt: skip
        raise


async def _close(group: ShardGroup | None) -> None:
    if group is not None:
        with contextlib.suppress(LoraxError):
            await group.close()
