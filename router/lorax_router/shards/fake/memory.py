"""The paged memory of FakeShard: it finds lost, shared, stale and doubly written blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorax_contract.step import BlockCopy, BlockId, RequestId
from lorax_router.shards.fake.model import digest_of, key_of

DEVICE_SPACE = 0


class FakeShardError(AssertionError):
    """A step broke the contract of plans: a bug in whoever made it, never bad luck."""


class FakeMemory:
    """Blocks of keys, each written by at most one live row. Owned by a FakeShard.

    Of a block it keeps the sum of its keys and how many it holds: enough to tell
    any difference in content, and cheap to read.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._sums = [0] * num_blocks
        self._fills = [0] * num_blocks
        # Who reads or writes a block: one row, or several rows that share a full one.
        self._owners: list[set[RequestId]] = [set() for _ in range(num_blocks)]
        # By the content of which adapter it was computed; "": by the base model.
        self._adapters = [""] * num_blocks
        self._host: dict[int, tuple[int, int, str]] = {}

    def share(
        self, request_id: RequestId, adapters: Sequence[str], blocks: Sequence[BlockId],
        token_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """Give a row blocks that hold its first tokens already; all else is refused."""
        size = self.block_size
        for number, block in enumerate(blocks):
            ids = token_ids[number * size : (number + 1) * size]
            wanted = sum(key_of(each, number * size + i) for i, each in enumerate(ids))
            if len(ids) < size and self._owners[block]:
                raise FakeShardError(
                    f"request {request_id} shares block {block}, which is not full and which "
                    f"request {min(self._owners[block])} still owns"
                )
            if self._content(block) != (wanted, len(ids), adapters[number]):
                raise FakeShardError(
                    f"request {request_id} shares block {block} as its block {number}, which holds "
                    "something else"
                )
            self._owners[block].add(request_id)

    def grant(
        self, request_id: RequestId, blocks: Sequence[BlockId], adapters: Sequence[str] = ()
    ) -> None:
        """Give blocks to a row, empty; a block that a live row owns is refused.

        ``adapters`` says what computes each; the base model if absent.
        """
        for block, adapter in zip(blocks, adapters or [""] * len(blocks), strict=True):
            if not 0 <= block < self.num_blocks:
                raise FakeShardError(
                    f"request {request_id} was granted block {block}, "
                    f"outside the pool of {self.num_blocks}"
                )
            if owners := self._owners[block]:
                raise FakeShardError(
                    f"request {request_id} was granted block {block}, "
                    f"which request {min(owners)} still owns"
                )
            self._owners[block].add(request_id)
            self._adapters[block] = adapter
            self._sums[block] = self._fills[block] = 0

    def free(self, request_id: RequestId, blocks: Iterable[BlockId]) -> None:
        """Take blocks from a row that owned them; their content stays until granted anew."""
        for block in blocks:
            self._owners[block].discard(request_id)

    def write(
        self,
        request_id: RequestId,
        table: Sequence[BlockId],
        position: int,
        token_ids: Sequence[int],
    ) -> None:
        """Store tokens of a row from ``position`` on; each place is written once, in order."""
        for token_id in token_ids:
            index, offset = divmod(position, self.block_size)
            if index >= len(table):
                raise FakeShardError(
                    f"request {request_id} has {len(table)} blocks, none for position {position}"
                )
            block = table[index]
            if self._fills[block] != offset:
                raise FakeShardError(
                    f"request {request_id} writes position {position} to place {offset} of "
                    f"block {block}, which holds {self._fills[block]} tokens"
                )
            self._sums[block] += key_of(token_id, position)
            self._fills[block] = offset + 1
            position += 1

    def digest(self, table: Sequence[BlockId]) -> int:
        """Return the digest of a sequence as it is read back through its block table."""
        return digest_of(map(self._sums.__getitem__, table))

    def _content(self, block: int) -> tuple[int, int, str]:
        return self._sums[block], self._fills[block], self._adapters[block]

    def copy(self, copy: BlockCopy) -> None:
        """Copy one block within or between device and host."""
        if copy.source_space == DEVICE_SPACE:
            content = self._content(copy.source_block)
        elif copy.source_block in self._host:
            content = self._host[copy.source_block]
        else:
            raise FakeShardError(f"host block {copy.source_block} is read but was never written")
        if copy.destination_space == DEVICE_SPACE:
            block = copy.destination_block
            self._sums[block], self._fills[block], self._adapters[block] = content
        else:
            self._host[copy.destination_block] = content

    @property
    def num_owned(self) -> int:
        """How many blocks live rows own."""
        return sum(bool(owners) for owners in self._owners)
