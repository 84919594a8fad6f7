"""A shard group in one process: an engine a rank, real command queues, real fan-out.

The ranks meet as threads. Each call reaches each rank after a delay of its own, and each step
dawdles somewhere, so that prepare calls and steps interleave differently on every rank.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from tests.helpers.thread_ranks import Meeting, ThreadGroup
from tests.helpers.toy_adapters import SlottedToy, ToyAdapter, ToyPrepared
from tests.helpers.toy_paged_model import BLOCK_SIZE, toy_tokenizer

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterTiers,
    FetchedAdapter,
    LoadReport,
)
from lorax_contract.step import AdapterHandle, ShardInfo, StepOutcome, StepPlan, WarmupSpec
from lorax_router.shards.group import ShardGroup
from lorax_shard.engine.drafter import Drafter
from lorax_shard.engine.engine import Engine
from lorax_shard.engine.memory import PoolSettings
from lorax_shard.rpc.queue import CommandQueue

# Longest delay of a call, and of a place within a step, in seconds.
_DELAY_S = 0.004
# How far the logits of ranks are apart, far beyond rounding: their own draws would differ.
_NOISE = 2.0


class DawdlingModel(SlottedToy):
    """A toy model that takes its time; on ranks other than 0 its logits are wrong.

    Of its passes of several rows those fail, on all ranks, that ``fails`` says, which is given the
    number of each.
    """

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__()
        self._rank = rank
        self._random = random.Random(f"{seed} {rank}")
        self.fails: Callable[[int], bool] = lambda number: False
        self.num_together = 0

    def forward(
        self, input_ids, positions, metadata, logit_rows, slots=(), slot_lens=None, segments=None
    ):
        time.sleep(self._random.random() * _DELAY_S)
        if len(metadata.query_lens) > 1:
            self.num_together += 1
            if self.fails(self.num_together):
                raise RuntimeError("planted")
        logits = super().forward(input_ids, positions, metadata, logit_rows, slots, slot_lens)
        if self._rank:
            logits = logits + _NOISE * torch.rand_like(logits)
        return logits


class Unread:
    """The tokenizer of ranks that make no texts."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError("rank 0 alone makes texts")


class LocalRank:
    """Implements ShardClient for one rank."""

    def __init__(
        self,
        meeting: Meeting,
        rank: int,
        *,
        seed: int,
        num_blocks: int,
        adapter_of: Callable[[int, AdapterHandle], ToyAdapter],
        swap_bytes: int = 0,
        drafter: Drafter | None = None,
    ) -> None:
        self.rank, self.world_size = rank, len(meeting.values)
        self.lane = ToyPrepared()
        self.broken: list[Exception] = []
        self._adapter_of = adapter_of
        self._random = random.Random(f"{seed} calls {rank}")
        pool = PoolSettings(
            block_size=BLOCK_SIZE, memory_fraction=0.5, num_blocks=num_blocks,
            swap_bytes=swap_bytes,
        )  # fmt: skip
        group = ThreadGroup(meeting, rank) if self.world_size > 1 else None
        model = DawdlingModel(rank, seed)
        tokenizer = toy_tokenizer() if rank == 0 else Unread()
        self.engine = Engine(
            model, tokenizer, pool, adapters=self.lane, group=group, drafter=drafter
        )
        self.commands = CommandQueue(1, on_broken=self.broken.append)

    async def _arrive(self) -> None:
        await asyncio.sleep(self._random.random() * _DELAY_S)

    async def info(self) -> ShardInfo:
        return ShardInfo(
            epoch=1, world_size=self.world_size, model_type="toy", dtype="float32",
            device_type="cpu", block_size=BLOCK_SIZE, vocab_size=self.engine.model.vocab_size,
            max_positions=512, num_blocks=self.engine.num_blocks, max_depth=3,
            num_host_blocks=self.engine.num_host_blocks,
        )  # fmt: skip

    async def warmup(self, spec: WarmupSpec) -> int:
        return await self.commands.run(lambda: self.engine.warm_up(spec))

    async def step(self, plan: StepPlan) -> StepOutcome:
        await self._arrive()
        return await self.commands.run(
            lambda: self.engine.launch(plan), finish=self.engine.collect, epoch=1, seq=plan.seq
        )

    async def clear(self, seq: int) -> None:
        await self._arrive()
        await self.commands.run(self.engine.clear, epoch=1, seq=seq)

    async def take_over(self, epoch: int) -> None:
        raise AssertionError("nobody else was here")

    async def fetch_adapter(self, query: AdapterQuery) -> FetchedAdapter:
        raise AssertionError("nothing is fetched here")

    async def adapter_text(self, store_digest: str, names: Sequence[str]) -> Mapping[str, bytes]:
        raise AssertionError("nothing is fetched here")

    async def prepare_adapter(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        await self._arrive()
        self.lane[handle] = self._adapter_of(self.rank, handle)
        return LoadReport(device_bytes=1)

    async def release_adapter(
        self, handle: AdapterHandle, forget: Sequence[AdapterPart] = ()
    ) -> None:
        await self._arrive()
        assert handle not in self.engine.adapters
        self.lane.pop(handle, None)

    async def adapter_tiers(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        return AdapterTiers(device={}, host={}, disk={})

    async def health(self) -> None:
        await self._arrive()
        self.commands.check_alive()

    async def close(self) -> None:
        assert await self.commands.close(10.0)


class Carrier:
    """Brings adapters to a group by the group's own calls."""

    def __init__(self, group: ShardGroup) -> None:
        self._group = group

    async def prepare(self, handle: AdapterHandle) -> LoadReport:
        return await self._group.prepare_adapter(
            handle, AdapterContent(parts=(AdapterPart(f"content {handle}", "files"),))
        )

    async def release(self, handle: AdapterHandle) -> None:
        await self._group.release_adapter(handle)

    def no_numbers(self, handle: AdapterHandle) -> None:
        pass

    def shards_lost(self) -> None:
        pass

    def numbers(self, handle: AdapterHandle) -> None:
        pass
