"""The pool of KV blocks: who holds each block, and when a freed one may be reused."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lorax_contract.step import BlockId
from lorax_router.core.prefix import PrefixIndex
from lorax_router.core.tenant_blocks import TenantBlocks


class _Release(NamedTuple):
    """Blocks that nobody holds any more, free once a step is acknowledged."""

    step: int
    number: int
    blocks: list[BlockId]


class BlockPool:
    """Hands out block ids, counts who holds them, and keeps what may be found again.

    Every block is in exactly one of four states::

        free ──take──► held (by one request's block table, or by several)
          ▲    ┌─take──► │ ▲
          │    │         │ └──────────── share ◄─────────────┐
          │  cached ◄────┤ release(last_step), in the index  │ (also while releasing)
          │    │         │   ├── last_step acknowledged ─────┤
          └────┴─────────┴── releasing (until it is) ────────┘

    Of cached blocks the one released longest ago is taken first, of tenants that have more than
    their share before others'. A row's blocks are released
    from its end, so that a chain loses its last block before those that lead to it.
    The free list is last in, first out: a block used a moment ago is still warm in the
    caches of the device.
    """

    __slots__ = (
        "_acknowledged", "_cached", "_free", "_holders", "_last_steps", "_latest",
        "_num_releases", "_num_releasing", "_releasing", "evicts", "index", "num_blocks",
        "tenants",
    )  # fmt: skip

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self.index = index
        self.tenants = TenantBlocks(num_blocks, is_split=not index.is_shared)
        # Is told of a cached block before it is used for something else.
        self.evicts: Callable[[BlockId], None] | None = None
        self._free = [BlockId(block) for block in range(num_blocks - 1, -1, -1)]
        # In order of their release.
        self._cached: dict[BlockId, None] = {}
        self._holders = [0] * num_blocks
        # The last step that touches a block, as its latest holder said.
        self._last_steps = [0] * num_blocks
        # The latest release of a block, by number; few releases wait at once.
        self._latest = [0] * num_blocks
        self._num_releases = 0
        self._releasing: deque[_Release] = deque()
        self._num_releasing = 0
        self._acknowledged = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._cached)

    @property
    def num_unused(self) -> int:
        """Blocks that can be taken before any cached one."""
        return len(self._free)

    @property
    def num_releasing(self) -> int:
        """Blocks that become free when steps in flight are acknowledged."""
        return self._num_releasing

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content may be found again."""
        return len(self._cached)

    def take(self, num: int, tenant: str) -> list[BlockId]:
        """Remove ``num`` blocks from the free ones; the caller has asked ``num_free`` before."""
        if num > self.num_free:
            raise ValueError(f"asked for {num} KV blocks with {self.num_free} free")
        start = max(len(self._free) - num, 0)
        taken = self._free[start:]
        del self._free[start:]
        while len(taken) < num:
            found = self.tenants.victim()
            block = next(iter(self._cached)) if found is None else found
            del self._cached[block]
            self.tenants.uncached(block)
            self.tenants.freed(block)
            if self.evicts is not None:
                self.evicts(block)
            self.index.forget(block)
            taken.append(block)
        for block in taken:
            self._holders[block] = 1
        self.tenants.taken(tenant, taken)
        return taken

    def take_one(self, tenant: str) -> BlockId:
        """Remove one block from the free ones, of which there are some: as ``take``, for most rows."""
        if not self._free:
            return self.take(1, tenant)[0]
        block = self._free.pop()
        self._holders[block] = 1
        self.tenants.taken(tenant, (block,))
        return block

    def num_sharers(self, block: BlockId) -> int:
        """Return how many hold a block."""
        return self._holders[block]

    def num_in_use(self, chain: Sequence[BlockId]) -> int:
        """Return how many blocks of a chain are held: sharing them takes nothing from the pool.

        Whoever holds a block holds those that lead to it: O(log of the chain).
        """
        return bisect_left(chain, True, key=lambda block: not self._holders[block])

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Hold blocks that the index found, beside whoever holds them already."""
        for block in blocks:
            self._holders[block] += 1
            if self._holders[block] == 1:
                if block in self._cached:
                    del self._cached[block]
                    self.tenants.uncached(block)
                else:
                    self._num_releasing -= 1

    def release(self, blocks: list[BlockId], last_step: int) -> None:
        """Give blocks back; they are free once step ``last_step`` is acknowledged."""
        left: list[BlockId] = []
        for block in reversed(blocks):
            self._holders[block] -= 1
            if last_step > self._last_steps[block]:
                self._last_steps[block] = last_step
            if not self._holders[block]:
                left.append(block)
        if not left:
            return
        self._num_releases += 1
        self._num_releasing += len(left)
        # Who held one before may be touching it for longer.
        by_step: dict[int, list[BlockId]] = {}
        for block in left:
            self._latest[block] = self._num_releases
            by_step.setdefault(self._last_steps[block], []).append(block)
        for step, some in by_step.items():
            release = _Release(step, self._num_releases, some)
            if step <= self._acknowledged:
                self._make_free(release)
            else:
                self._releasing.append(release)

    def _make_free(self, release: _Release) -> None:
        for block in release.blocks:
            if not self._is_of(block, release):
                continue
            self._num_releasing -= 1
            if block in self.index:
                self._cached[block] = None
                self.tenants.cached(block)
            else:
                self._free.append(block)
                self.tenants.freed(block)

    def _is_of(self, block: BlockId, release: _Release) -> bool:
        """Whether nobody has held a block since that release."""
        return not self._holders[block] and self._latest[block] == release.number

    def is_acknowledged(self, step: int) -> bool:
        """Whether a step is done on every rank."""
        return step <= self._acknowledged

    def acknowledge(self, step: int) -> None:
        """Step ``step`` and all before it are done on every rank."""
        self._acknowledged = step
        for _ in range(len(self._releasing)):
            release = self._releasing.popleft()
            if release.step <= step:
                self._make_free(release)
            else:
                self._releasing.append(release)

    def check(self, tables: list[list[BlockId]]) -> None:
        """Raise AssertionError unless each block is in one state, and held by its ``tables``."""
        holders = [0] * self.num_blocks
        for table in tables:
            for block in table:
                holders[block] += 1
        if holders != self._holders:
            raise AssertionError("the holders of blocks are counted wrong")
        held = {block for table in tables for block in table}
        releasing = {
            block for release in self._releasing for block in release.blocks
            if self._is_of(block, release)
        }  # fmt: skip
        if len(releasing) != self._num_releasing:
            raise AssertionError("the count of releasing blocks is off")
        everything = sorted([*self._free, *self._cached, *releasing, *held])
        if everything != list(range(self.num_blocks)):
            raise AssertionError(
                f"blocks lost or shared: {len(self._free)} free, {len(self._cached)} cached, "
                f"{len(releasing)} releasing, {len(held)} held of {self.num_blocks}"
            )
        self.tenants.check({*self._cached, *releasing, *held}, self._cached)
        self.index.check({*self._cached, *releasing, *held})
