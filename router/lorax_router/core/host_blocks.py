"""Blocks of KV in host memory: what was moved out of the pool, to come back instead of computing."""

from __future__ import annotations

from typing import NewType

from lorax_router.core.prefix import PrefixIndex

HostBlockId = NewType("HostBlockId", int)


class HostBlocks:
    """Hands out host blocks, counts who holds them, and keeps what the index may find again.

    ::

        free ──take──► held (by one request that waits, or by several)
          ▲    ┌─take──► │ ▲
          │  cached ◄────┤ hold
          └──────────────┘ release

    Of cached blocks the one released longest ago is taken first. Copies are executed in the
    order in which they were decided, so a block may be taken again at once.
    """

    __slots__ = ("_cached", "_free", "_holders", "_index", "num_blocks")

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self.num_blocks = num_blocks
        self._index = index
        self._free = [HostBlockId(block) for block in range(num_blocks - 1, -1, -1)]
        self._cached: dict[HostBlockId, None] = {}
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content may be found again."""
        return len(self._cached)

    def take(self) -> HostBlockId:
        """Hold a free block; the caller has asked ``num_free`` before."""
        if self._free:
            block = self._free.pop()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            self._index.forget_copy(block)
        self._holders[block] = 1
        return block

    def hold(self, block: HostBlockId) -> None:
        """Hold a block that the index found."""
        if not self._holders[block]:
            del self._cached[block]
        self._holders[block] += 1

    def release(self, blocks: list[HostBlockId]) -> None:
        """Let go of blocks; what the index can find stays until the room is needed."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._index.has_copy(block):
                self._cached[block] = None
            else:
                self._free.append(block)

    def touch(self, block: HostBlockId) -> None:
        """A cached block is of use again: it stays longer."""
        if block in self._cached:
            del self._cached[block]
            self._cached[block] = None

    def check(self, tables: list[list[HostBlockId]]) -> None:
        """Raise AssertionError unless each block is free, cached, or held by its ``tables``."""
        holders = [0] * self.num_blocks
        for table in tables:
            for block in table:
                holders[block] += 1
        if holders != self._holders:
            raise AssertionError("the holders of host blocks are counted wrong")
        held = [block for block, num in enumerate(holders) if num]
        if sorted([*self._free, *self._cached, *held]) != list(range(self.num_blocks)):
            raise AssertionError(
                f"host blocks lost or shared: {len(self._free)} free, {len(self._cached)} cached, "
                f"{len(held)} held of {self.num_blocks}"
            )
        self._index.check_copies({*self._cached, *held})
