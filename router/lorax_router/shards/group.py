"""All ranks as one: every call goes to each of them at once, and the answers become one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Self, TypeVar

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterTiers,
    AdapterUnavailableError,
    FetchedAdapter,
    LoadReport,
    Reason,
)
from lorax_contract.constraint import Constraint
from lorax_contract.errors import ShardError
from lorax_contract.step import (
    AdapterHandle,
    ShardInfo,
    StepOutcome,
    StepPlan,
    WarmupSpec,
)
from lorax_proto.mutual_tls import MutualTls
from lorax_router.core.ports import ShardClient
from lorax_router.shards.grpc_client import CallTimeouts, GrpcShardClient

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ShardGroup:
    """Implements ShardClient over the clients of all ranks, which it owns.

    A call is sent to all ranks without waiting for earlier ones: the sequence
    numbers order it within each rank. If one rank fails, the call fails at once,
    and its error names the rank.

    Args:
        ranks: the clients, by rank.
        has_one_store: whether all ranks find in rank 0's store what it fetched, as on one host.
    """

    def __init__(self, ranks: Sequence[ShardClient], *, has_one_store: bool = True) -> None:
        if not ranks:
            raise ValueError("a shard group needs at least one rank")
        self._ranks = tuple(ranks)
        self._has_one_store = has_one_store

    @classmethod
    async def connect(
        cls, uri: str, *, timeouts: CallTimeouts | None = None, tls: MutualTls | None = None
    ) -> Self:
        """Ask rank 0 at ``uri`` for all addresses and connect to every rank of one epoch."""
        first = GrpcShardClient(uri, timeouts=timeouts, tls=tls)
        try:
            uris = await first.discover()
        finally:
            await first.close()
        uris = uris or (uri,)
        ranks = [GrpcShardClient(each, timeouts=timeouts, tls=tls) for each in uris]
        # Who is reached by TCP may have a host of its own; one that has not finds it there.
        group = cls(ranks, has_one_store=all(each.startswith("unix:") for each in uris))
        try:
            await group.info()
        except BaseException:
            await group.close()
            raise
        return group

    async def info(self) -> ShardInfo:
        """Return what the group is; ranks that do not belong together raise ShardError."""
        return merge_infos(await self._all(lambda rank: rank.info()))

    async def warmup(self, spec: WarmupSpec) -> int:
        """Size the KV pool of every rank and return the least number of blocks."""
        return min(await self._all(lambda rank: rank.warmup(spec)))

    async def step(self, plan: StepPlan) -> StepOutcome:
        """Execute one step on all ranks; rank 0 answers for all."""
        return (await self._all(lambda rank: rank.step(plan)))[0]

    async def clear(self, seq: int) -> None:
        """Drop all rows on all ranks, in the order of the commit lane."""
        await self._all(lambda rank: rank.clear(seq))

    async def take_over(self, epoch: int) -> None:
        """Begin an epoch with all ranks, which served another router."""
        await self._all(lambda rank: rank.take_over(epoch))

    async def fetch_adapter(self, query: AdapterQuery) -> FetchedAdapter:
        """Have rank 0 fetch, and then those that have stores of their own: the same content.

        They are told what rank 0 has, and read it from there where the source does not give it.
        Raises what a rank says; AdapterUnavailableError where they have different contents.
        """
        first = await self._named(0, self._ranks[0].fetch_adapter(query))
        if self._has_one_store:
            return first
        wanting = replace(query, wanted=first)
        others = await asyncio.gather(
            *(
                self._named(rank, client.fetch_adapter(wanting))
                for rank, client in enumerate(self._ranks[1:], 1)
            )
        )
        if any(each.part != first.part for each in others):
            text = (
                f"adapter {query.ref} is not the same for all ranks: it was replaced at its source"
            )
            raise AdapterUnavailableError(Reason.TRANSIENT, text)
        return first

    async def adapter_text(self, store_digest: str, names: Sequence[str]) -> Mapping[str, bytes]:
        """Return what rank 0 has."""
        return await self._named(0, self._ranks[0].adapter_text(store_digest, names))

    async def prepare_adapter(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        """Make an adapter ready on all ranks; after a partial failure it is on none.

        Raises the error of the lowest rank that failed, once all ranks have answered.
        """
        calls = [
            self._named(rank, client.prepare_adapter(handle, content))
            for rank, client in enumerate(self._ranks)
        ]
        results = await asyncio.gather(*calls, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            # A rank whose answer was lost may have prepared it as well: release on all.
            releases = [client.release_adapter(handle) for client in self._ranks]
            for failure in await asyncio.gather(*releases, return_exceptions=True):
                if failure is not None:
                    logger.warning("adapter %s could not be released: %s", handle, failure)
            raise failures[0]
        reports = [result for result in results if isinstance(result, LoadReport)]
        return LoadReport(
            device_bytes=max(report.device_bytes for report in reports),
            parse_s=max(report.parse_s for report in reports),
            copy_s=max(report.copy_s for report in reports),
        )

    async def release_adapter(
        self, handle: AdapterHandle, forget: Sequence[AdapterPart] = ()
    ) -> None:
        """Free an adapter on all ranks."""
        await self._all(lambda rank: rank.release_adapter(handle, forget))

    async def prepare_constraint(
        self, constraint: Constraint, content: AdapterContent | None = None
    ) -> None:
        """Have rank 0, which draws, make a constraint ready."""
        await self._named(0, self._ranks[0].prepare_constraint(constraint, content))

    async def adapter_tiers(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        """Return where adapters lie: on a device if all ranks have them there."""
        return merge_tiers(await self._all(lambda rank: rank.adapter_tiers(parts)))

    async def health(self) -> None:
        """Return if all ranks are healthy."""
        await self._all(lambda rank: rank.health())

    async def lost(self) -> ShardError:
        """Return once any rank is gone."""
        watches = [
            asyncio.ensure_future(self._named_loss(rank, client))
            for rank, client in enumerate(self._ranks)
        ]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()

    async def _named_loss(self, rank: int, client: ShardClient) -> ShardError:
        error = await client.lost()
        return type(error)(f"rank {rank} of {len(self._ranks)}: {error}")

    async def close(self) -> None:
        """Close all ranks, each whatever happens to the others."""
        results = await asyncio.gather(
            *(rank.close() for rank in self._ranks), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _all(self, call: Callable[[ShardClient], Awaitable[Result]]) -> list[Result]:
        """Call all ranks at once; the first failure ends the call without the others' answers.

        A rank may wait for the failed one in a collective: its answer may never come.
        """
        if len(self._ranks) == 1:
            return [await self._named(0, call(self._ranks[0]))]
        try:
            async with asyncio.TaskGroup() as tasks:
                answers = [
                    tasks.create_task(self._named(rank, call(client)))
                    for rank, client in enumerate(self._ranks)
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [answer.result() for answer in answers]

    async def _named(self, rank: int, answer: Awaitable[Result]) -> Result:
        """Return a rank's answer; what it raises names the rank."""
        try:
            return await answer
        except ShardError as error:
            raise type(error)(f"rank {rank} of {len(self._ranks)}: {error}") from error


def merge_infos(infos: Sequence[ShardInfo]) -> ShardInfo:
    """Return what a group is; limits that differ are the least, other differences ShardError."""
    for name in ("epoch", "world_size", "model_type", "dtype", "block_size", "vocab_size"):
        if len(values := {getattr(info, name) for info in infos}) > 1:
            raise ShardError(
                f"the ranks differ in {name}: {', '.join(map(str, sorted(values)))}; "
                "start all of them with one configuration"
            )
    first = infos[0]
    if first.world_size != len(infos):
        raise ShardError(
            f"rank 0 belongs to a group of {first.world_size}, but {len(infos)} ranks were found; "
            "its list of addresses must have one for each"
        )
    windows = [info.window_size for info in infos if info.window_size is not None]
    return replace(
        first,
        # 0 means unbounded.
        max_positions=min((i.max_positions for i in infos if i.max_positions), default=0),
        num_blocks=min(info.num_blocks for info in infos),
        max_depth=min(info.max_depth for info in infos),
        adapter_bytes=min(info.adapter_bytes for info in infos),
        num_host_blocks=min(info.num_host_blocks for info in infos),
        # A step waits for the slowest.
        block_move_s=max(info.block_move_s for info in infos),
        memory=min((info.memory for info in infos), key=_spare_bytes),
        rank_memory=tuple(info.memory for info in infos),
        window_size=min(windows, default=None),
        shard_uris=tuple(uri for info in infos for uri in info.shard_uris),
    )


def _spare_bytes(memory: Sequence[tuple[str, int]]) -> int:
    """Return what a rank's plan leaves: with pools of one size, the fullest rank has the least."""
    return dict(memory).get("unused", 0)


def merge_tiers(tiers: Sequence[AdapterTiers]) -> AdapterTiers:
    """Return what all ranks have, with the bytes of the fullest; files are rank 0's."""
    device = {
        handle: (key, max(each.device[handle][1] for each in tiers))
        for handle, (key, _) in tiers[0].device.items()
        if all(handle in each.device for each in tiers)
    }
    host = {
        digest: max(each.host[digest] for each in tiers)
        for digest in tiers[0].host
        if all(digest in each.host for each in tiers)
    }
    return AdapterTiers(device=device, host=host, disk=tiers[0].disk)
