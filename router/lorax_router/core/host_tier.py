"""KV that leaves the pool for host memory and comes back: of requests that gave way, and cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

from lorax_contract.step import BlockCopy, BlockId, BlockSpace, RequestId
from lorax_router.core.blocks import BlockPool
from lorax_router.core.host_blocks import HostBlockId, HostBlocks
from lorax_router.core.request import RequestState
from lorax_router.core.stats import HostBlockStats
from lorax_router.core.swapping import MoveOrCompute


class KeptTokens(NamedTuple):
    """What need not be computed of a request: blocks of the pool, host blocks behind them."""

    blocks: list[BlockId]
    host_blocks: Sequence[int]
    num_tokens: int


class HostTier:
    """Decides what is moved, and keeps the copies for the next plan. Owned by RunningRows.

    Copies are executed in the order of the plans and of each plan's list, before anything of
    the step is computed and after all earlier steps: a block that gives its content away may be
    granted anew in the same plan, and a host block may be taken again at once.

    A full block that the index knows is moved once, whoever gives way with it.

    Args:
        num_blocks: blocks in host memory of each rank.
        choice: whether it pays.
        keeps_evicted: whether cached blocks that the pool needs are kept, too.
        pool: what they leave and come back to.
    """

    def __init__(
        self, num_blocks: int, choice: MoveOrCompute, keeps_evicted: bool, pool: BlockPool
    ) -> None:
        self._num_blocks = num_blocks
        self._choice = choice
        self._keeps_evicted = keeps_evicted
        self._copies: list[BlockCopy] = []
        # Those that wait swapped out.
        self._swapped: dict[RequestId, RequestState] = {}
        self._num_out = self._num_in = self._num_swaps = 0
        self._attach(pool)

    def _attach(self, pool: BlockPool) -> None:
        self._pool = pool
        self._index = pool.index
        self._host = HostBlocks(self._num_blocks, pool.index)
        if self._keeps_evicted:
            pool.evicts = self._keep

    def take_copies(self) -> list[BlockCopy]:
        """Return the copies that were decided since the last plan, in their order."""
        copies, self._copies = self._copies, []
        return copies

    # --- out ------------------------------------------------------------------------

    def swap_out(self, request: RequestState) -> None:
        """Move what a running request has, if there is room and it pays."""
        if not request.num_scheduled or _tells_prompt(request):
            return
        # Those that were granted for what may be kept of drafts hold nothing that is needed.
        blocks = request.blocks[: -(-request.num_scheduled // self._index.block_size)]
        copies = [self._index.copy_of(block) for block in blocks]
        if not self._pays(request, copies):
            return
        for copy in copies:
            if copy is not None:
                self._host.hold(HostBlockId(copy))
        if copies.count(None) > self._host.num_free:
            self._host.release([HostBlockId(copy) for copy in copies if copy is not None])
            return
        request.host_blocks = [
            self._move_out(block) if copy is None else copy
            for block, copy in zip(blocks, copies, strict=True)
        ]
        # Steps in flight are done before the copies.
        request.num_swapped = request.num_scheduled
        self._swapped[request.request_id] = request
        self._num_swaps += 1

    def _pays(self, request: RequestState, copies: list[int | None]) -> bool:
        """Whether moving beats computing; what others hold is there later, too."""
        sharers = self._pool.num_sharers
        num_shared = next(
            (number for number, block in enumerate(request.blocks) if sharers(block) < 2),
            len(copies),
        )
        return self._choice.moves(
            num_out=copies.count(None),
            num_in=len(copies) - num_shared,
            num_tokens=request.num_scheduled - num_shared * self._index.block_size,
        )

    def _keep(self, block: BlockId) -> None:
        """The pool takes a cached block: its content stays findable, if that pays."""
        copy = self._index.copy_of(block)
        if copy is not None:
            self._host.touch(HostBlockId(copy))
        elif self._host.num_free and self._choice.moves(
            num_out=1, num_in=1, num_tokens=self._index.block_size
        ):
            self._host.release([self._move_out(block)])

    def _move_out(self, block: BlockId) -> HostBlockId:
        copy = self._host.take()
        self._copies.append(BlockCopy(BlockSpace.DEVICE, block, BlockSpace.HOST, copy))
        self._index.copied(block, copy)
        self._num_out += 1
        return copy

    # --- back -----------------------------------------------------------------------

    def kept(self, request: RequestState, blocks: list[BlockId]) -> KeptTokens:
        """Return what need not be computed, given the blocks that the index found."""
        num_found = len(blocks) * self._index.block_size
        if request.host_blocks:
            if request.num_swapped > num_found:
                behind = request.host_blocks[len(blocks) :]
                return KeptTokens(blocks, behind, request.num_swapped)
            return KeptTokens(blocks, (), num_found)
        copies = self._index.match_copies(request)
        return KeptTokens(blocks, copies, num_found + len(copies) * self._index.block_size)

    def bring(self, request: RequestState, kept: KeptTokens) -> list[BlockId]:
        """Have a request's host blocks copied into blocks of the pool, and return those."""
        source = [HostBlockId(block) for block in kept.host_blocks]
        for block in source:
            self._host.hold(block)
        destination = self._pool.take(len(source), request.terms.tenant) if source else []
        self._copies += [
            BlockCopy(BlockSpace.HOST, each, BlockSpace.DEVICE, block)
            for each, block in zip(source, destination, strict=True)
        ]
        self._num_in += len(source)
        self._host.release(source)
        self.let_go(request)
        return destination

    def let_go(self, request: RequestState) -> None:
        """A request needs its host blocks no more."""
        if self._swapped.pop(request.request_id, None) is not None:
            self._host.release(cast(list[HostBlockId], request.host_blocks))
            request.host_blocks, request.num_swapped = [], 0

    def start_anew(self, pool: BlockPool) -> None:
        """Host memory is gone with the shards: those that wait swapped out are computed anew."""
        for request in list(self._swapped.values()):
            self.let_go(request)
        self._copies.clear()
        self._attach(pool)

    # --- facts ----------------------------------------------------------------------

    def stats(self) -> HostBlockStats:
        """Return a snapshot."""
        host = self._host
        return HostBlockStats(
            num_blocks=host.num_blocks,
            num_held=host.num_blocks - host.num_free,
            num_cached=host.num_cached,
            num_moved_out=self._num_out,
            num_moved_in=self._num_in,
            num_swaps=self._num_swaps,
        )

    def check(self) -> None:
        """Raise AssertionError unless each host block is free, cached or somebody's."""
        self._host.check([cast(list[HostBlockId], r.host_blocks) for r in self._swapped.values()])
        if any(not request.host_blocks for request in self._swapped.values()):
            raise AssertionError("a request is called swapped out and holds no host block")


def _tells_prompt(request: RequestState) -> bool:
    """Whether what comes of computing its prompt is not on its way yet."""
    is_told = request.output_ids or request.num_pending
    return request.spec.computes_all and not is_told
