"""Full blocks of KV, found again by what they hold."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence

from lorax_contract.step import BASE_ADAPTER, BlockId
from lorax_router.core.request import RequestState


class BlockNames:
    """Says what full blocks hold: a key to find one by, and what is compared then.

    Args:
        block_size: tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def key(self, request: RequestState, number: int, before: int) -> int:
        """Return a hash of a block's tokens and of the key before it."""
        return hash((before, self.content(request, number)))

    def content(self, request: RequestState, number: int) -> bytes:
        """Return bytes that are equal where a block's tokens are: four for each.

        In the block in which an adapter begins to act they also say which one, and where: what
        follows is that adapter's, since it follows that block.
        """
        start = number * self.block_size
        tokens = array("I", request.known_ids(start, start + self.block_size)).tobytes()
        first = request.spec.adapter_start or 0
        if first == 0 or number != first // self.block_size:
            return tokens
        return tokens + repr((request.adapter_content, first)).encode()


class _Node:
    """One full, computed block: what it holds, and the block before it or where the chain begins.

    It lies in the pool, or a copy of it in host memory, or both.
    """

    __slots__ = ("block", "content", "copy", "key", "parent")

    def __init__(self, block: BlockId, key: int, parent: _Node | Hashable, content: bytes) -> None:
        self.block: BlockId | None = block
        self.copy: int | None = None
        self.key = key
        self.parent = parent
        self.content = content


class PrefixIndex:
    """Chains of blocks by adapter, tenant, salt and tokens.

    ::

        (adapter, tenant, salt) ◄── block 0 ◄── block 1 ◄── ...

    What is computed before an adapter begins to act is the base model's, in its chains: requests of
    all adapters that are invoked behind it share it, and those of the base.

    An adapter is known by what it computes: one that comes back under another handle finds
    what it computed before.

    A block's key is a hash of its tokens and of the key before it; on a hit the tokens are
    compared and the block before it must be the one that was found: a collision is a miss,
    never another's block. Only what is computed and acknowledged ever enters.

    A chain loses its last block first, so what was found of a request that waits stays found up
    to the last block that is still there: it is looked for once, not in each plan.

    Blocks may have copies in host memory, and may go on there alone; what the pool has of a
    chain is its beginning all the same.

    Args:
        names: what the blocks of requests hold.
        is_on: whether anything is kept and found at all.
        is_shared: whether tenants find what other tenants computed.
    """

    def __init__(self, names: BlockNames, *, is_on: bool = True, is_shared: bool = False) -> None:
        self.block_size = names.block_size
        self._names = names
        self._is_on = is_on
        self.is_shared = is_shared
        self._nodes: dict[int, _Node] = {}
        self._by_block: dict[BlockId, _Node] = {}
        self._by_copy: dict[int, _Node] = {}
        # How often a block came back into the pool of which there was only a copy.
        self._num_returns = 0
        # Keys of blocks that rows are about to compute, and how many rows each.
        self._coming: dict[int, int] = {}

    def __contains__(self, block: BlockId) -> bool:
        return block in self._by_block

    def match(self, request: RequestState) -> list[BlockId]:
        """Return the blocks that hold the beginning of a request, all but one token at most.

        The list is not to be changed, and good until the index changes.
        """
        found = request.matched
        if not self._seeks(request):
            return found
        tail = request.matched_tail
        if request.num_returns != self._num_returns:
            # What came back may lie elsewhere.
            found.clear()
            request.num_returns = self._num_returns
        while found and not self._has(tail):
            found.pop()
            tail = tail.parent
        if not found:
            tail = self._root(request)
        most = (request.num_tokens - 1) // self.block_size
        for number in range(len(found), most):
            node = self._behind(tail, request, number)
            if node is None or node.block is None:
                break
            found.append(node.block)
            tail = node
        request.matched_tail = tail
        return found

    def match_copies(self, request: RequestState) -> list[int]:
        """Return the copies that go on behind the blocks that ``match`` just found."""
        copies: list[int] = []
        if not (self._by_copy and self._seeks(request)):
            return copies
        tail = request.matched_tail
        for number in range(len(request.matched), (request.num_tokens - 1) // self.block_size):
            node = self._behind(tail, request, number)
            if node is None or node.copy is None:
                break
            copies.append(node.copy)
            tail = node
        return copies

    def _seeks(self, request: RequestState) -> bool:
        """Whether a request may begin behind cached blocks; some need all computed."""
        return self._is_on and not request.spec.computes_all

    def _behind(self, tail: _Node | Hashable, request: RequestState, number: int) -> _Node | None:
        """Return what is kept of a request's block of that number behind what leads to it."""
        node = self._nodes.get(self._key(request, number))
        if node is None or node.parent != tail:
            return None
        return node if node.content == self._names.content(request, number) else None

    def _has(self, node: _Node) -> bool:
        return node.block is not None and self._nodes.get(node.key) is node

    def num_coming(self, request: RequestState, num_found: int) -> int:
        """Return how many tokens behind the blocks found are being computed by others."""
        if not (self._coming and self._seeks(request)):
            return 0
        most = (request.num_tokens - 1) // self.block_size
        num = num_found
        while num < most and self._key(request, num) in self._coming:
            num += 1
        return (num - num_found) * self.block_size

    def announce(self, request: RequestState) -> None:
        """A request is about to compute what it knows beyond its cached blocks."""
        if not self._is_on:
            return
        keys = self._keys(request, request.num_tokens // self.block_size)
        request.num_announced = len(keys)
        for key in keys[request.num_indexed :]:
            self._coming[key] = self._coming.get(key, 0) + 1

    def withdraw(self, request: RequestState) -> None:
        """A request does not run any more: what it did not compute does not come."""
        for key in request.block_keys[request.num_indexed : request.num_announced]:
            self._arrived(key)
        request.num_announced = 0

    def _arrived(self, key: int) -> None:
        if self._coming[key] == 1:
            del self._coming[key]
        else:
            self._coming[key] -= 1

    def add(self, request: RequestState) -> None:
        """Enter the full blocks that a request has computed by now.

        Where another was first with the same content its block stays the request's own, and
        so do those behind it: a chain never has a block that its row does not hold.
        """
        num_full = request.num_computed // self.block_size
        if num_full == request.num_indexed or not self._is_on:
            return
        keys = self._keys(request, num_full)
        for number in range(request.num_indexed, num_full):
            if number < request.num_announced:
                self._arrived(keys[number])
            if not request.is_unindexed:
                self._enter(request, number, keys[number])
        request.num_indexed = num_full

    def has_others(self, request: RequestState, num_computed: int) -> bool:
        """Whether a block that a request fills with so many tokens is in the index as another one."""
        num_full = num_computed // self.block_size
        if num_full == request.num_indexed or request.is_unindexed or not self._is_on:
            return False
        nodes = map(self._nodes.get, self._keys(request, num_full)[request.num_indexed :])
        return any(node is not None for node in nodes)

    def _enter(self, request: RequestState, number: int, key: int) -> None:
        block = request.blocks[number]
        parent = self._by_block[request.blocks[number - 1]] if number else self._root(request)
        content = self._names.content(request, number)
        known = self._nodes.get(key)
        if known is None:
            self._nodes[key] = self._by_block[block] = _Node(block, key, parent, content)
        elif known.block is None and known.parent == parent and known.content == content:
            known.block, self._by_block[block] = block, known
            self._num_returns += 1
        elif known.block is None:
            # A copy that no chain leads to any more: its place in host memory is free when
            # whoever holds it lets go.
            if known.copy is not None:
                self._by_copy.pop(known.copy, None)
            self._nodes[key] = self._by_block[block] = _Node(block, key, parent, content)
        else:
            request.is_unindexed = True

    def forget(self, block: BlockId) -> None:
        """A block is used for something else."""
        node = self._by_block.pop(block)
        node.block = None
        if node.copy is None:
            del self._nodes[node.key]

    # --- copies in host memory --------------------------------------------------------

    def copy_of(self, block: BlockId) -> int | None:
        """Return the copy of a block, if it has one."""
        node = self._by_block.get(block)
        return None if node is None else node.copy

    def copied(self, block: BlockId, copy: int) -> None:
        """A block was copied; of one that is not in the index nothing is found."""
        node = self._by_block.get(block)
        if node is not None:
            node.copy, self._by_copy[copy] = copy, node

    def has_copy(self, copy: int) -> bool:
        """Whether a host block is a copy that can be found."""
        return copy in self._by_copy

    def forget_copy(self, copy: int) -> None:
        """A host block is used for something else."""
        node = self._by_copy.pop(copy, None)
        if node is None:
            return  # no chain led to it any more
        node.copy = None
        if node.block is None:
            del self._nodes[node.key]

    def check_copies(self, held: set[int]) -> None:
        """Raise AssertionError unless all copies are in host blocks that are in use or kept."""
        for copy, node in self._by_copy.items():
            if copy not in held or node.copy != copy or self._nodes.get(node.key) is not node:
                raise AssertionError(f"host block {copy} is in the prefix index and nobody's")

    def _root(self, request: RequestState) -> tuple[Hashable, str, str]:
        """Where a chain begins: requests of other adapters, tenants or salts share nothing."""
        terms = request.terms
        adapter = BASE_ADAPTER if request.spec.adapter_start else request.adapter_content
        return adapter, "" if self.is_shared else terms.tenant, terms.cache_salt

    def _keys(self, request: RequestState, num: int) -> Sequence[int]:
        """Return the keys of a request's first blocks; they are computed once."""
        keys = request.block_keys
        if num > len(keys):
            self._key(request, num - 1)
        return keys[:num] if len(keys) > num else keys

    def _key(self, request: RequestState, number: int) -> int:
        """Return the key of one of a request's blocks."""
        keys = request.block_keys
        while len(keys) <= number:
            before = keys[-1] if keys else hash(self._root(request))
            keys.append(self._names.key(request, len(keys), before))
        return keys[number]

    def check(self, held: set[BlockId]) -> None:
        """Raise AssertionError unless each chain is whole; ``held`` are in use or kept."""
        for block, node in self._by_block.items():
            if block not in held or self._nodes.get(node.key) is not node:
                raise AssertionError(f"block {block} is in the prefix index and nobody's")
            parent = node.parent
            if isinstance(parent, _Node) and (
                parent.block is None or self._by_block.get(parent.block) is not parent
            ):
                raise AssertionError(f"block {block} follows one that is gone")
