"""The pool of KV blocks: who owns each block, and when a freed one may be reused."""

from __future__ import annotations

from collections import deque

from lorax_contract.step import BlockId


class BlockPool:
    """Hands out block ids and takes them back once no step in flight touches them.

    Every block is in exactly one of three states::

        free ──take──► owned (by one request's block table)
          ▲               │ release(last_step)
          │               ├── last_step already acknowledged ──► free
          └─acknowledge── releasing (until last_step is acknowledged)

    The free list is last in, first out: a block used a moment ago is still warm
    in the caches of the device.
    """

    __slots__ = ("_acknowledged", "_free", "_num_releasing", "_releasing", "num_blocks")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = [BlockId(block) for block in range(num_blocks - 1, -1, -1)]
        # (last step that touches them, blocks); few entries live at once.
        self._releasing: deque[tuple[int, list[BlockId]]] = deque()
        self._num_releasing = 0
        self._acknowledged = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free)

    @property
    def num_releasing(self) -> int:
        """Blocks that become free when steps in flight are acknowledged."""
        return self._num_releasing

    def take(self, num: int) -> list[BlockId]:
        """Remove ``num`` blocks from the free list; the caller has asked ``num_free`` before."""
        if num > len(self._free):
            raise ValueError(f"asked for {num} KV blocks with {len(self._free)} free")
        taken = self._free[len(self._free) - num :]
        del self._free[len(self._free) - num :]
        return taken

    def release(self, blocks: list[BlockId], last_step: int) -> None:
        """Give blocks back; they are free once step ``last_step`` is acknowledged."""
        if not blocks:
            return
        if last_step <= self._acknowledged:
            self._free.extend(blocks)
        else:
            self._releasing.append((last_step, blocks))
            self._num_releasing += len(blocks)

    def acknowledge(self, step: int) -> None:
        """Step ``step`` and all before it are done on every rank."""
        self._acknowledged = step
        for _ in range(len(self._releasing)):
            last_step, blocks = self._releasing.popleft()
            if last_step <= step:
                self._free.extend(blocks)
                self._num_releasing -= len(blocks)
            else:
                self._releasing.append((last_step, blocks))

    def check(self, owned: list[BlockId]) -> None:
        """Raise AssertionError unless free, releasing and ``owned`` partition the pool."""
        releasing = [block for _, blocks in self._releasing for block in blocks]
        if len(releasing) != self._num_releasing:
            raise AssertionError("the count of releasing blocks is off")
        everything = sorted([*self._free, *releasing, *owned])
        if everything != list(range(self.num_blocks)):
            raise AssertionError(
                f"blocks lost or shared: {len(self._free)} free, {len(releasing)} releasing, "
                f"{len(owned)} owned of {self.num_blocks}"
            )
