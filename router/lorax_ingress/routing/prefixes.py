"""Where prompts that begin alike were sent."""

from __future__ import annotations

from collections import OrderedDict

from lorax_ingress.routing.values import RouteRequest

# Replicas that are remembered for one block, the latest first.
_MAX_REPLICAS = 4


class PrefixMemory:
    """The replicas that were sent a prefix, by adapter, tenant and block; the least recent goes.

    Args:
        max_entries: blocks that are remembered.
        max_blocks: blocks of a prompt that are looked at.
    """

    def __init__(self, max_entries: int, max_blocks: int) -> None:
        self._max_entries, self._max_blocks = max_entries, max_blocks
        self._places: OrderedDict[tuple[str | None, str, bytes], tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def note(self, request: RouteRequest, replica: str) -> None:
        """A prompt was sent there."""
        places = self._places
        for block in request.prefix[: self._max_blocks]:
            key = (request.adapter, request.tenant, block)
            others = [each for each in places.pop(key, ()) if each != replica]
            places[key] = (replica, *others[: _MAX_REPLICAS - 1])
        while len(places) > self._max_entries:
            places.popitem(last=False)

    def find(self, request: RouteRequest, min_blocks: int) -> tuple[str, ...]:
        """Return who was sent most of a prompt's beginning; none where it is less than so much."""
        blocks = request.prefix[: self._max_blocks]
        for num in range(len(blocks), max(min_blocks, 1) - 1, -1):
            found = self._places.get((request.adapter, request.tenant, blocks[num - 1]))
            if found:
                return found
        return ()

    def forget(self, replica: str) -> None:
        """A replica is gone, and its cache with it: O(entries)."""
        for key, names in list(self._places.items()):
            if replica in names:
                left = tuple(each for each in names if each != replica)
                if left:
                    self._places[key] = left
                else:
                    del self._places[key]
