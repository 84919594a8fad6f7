"""Who may be in the house at once; nobody waits to be let in.

The base model and the adapters that are on the shards share one pool of permits. A request
whose adapter is not there may wait for a long time, whatever the source does, so it takes its
permit from pools beside that one: those of its adapters and of their sources. A source that
never answers, or an adapter that half the world asks for, then refuses its own requests only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from lorax_contract.errors import OverloadedError
from lorax_router.service.adapters.catalog import AdapterSelection

# Where permits are so few that half of them is next to nothing, an adapter may have them all.
_LEAST_FOR_ADAPTER = 32

_Pool = tuple[str, ...]
_COMMON: _Pool = ()


class Permit:
    """What a request holds while it is in the house."""

    def __init__(self, permits: Permits, num: int, pools: tuple[_Pool, ...]) -> None:
        self._permits: Permits | None = permits
        self._num = num
        self._pools = pools

    def give_back(self) -> None:
        """Let others in; more than once does nothing."""
        if self._permits is not None:
            self._permits._leave(self._num, self._pools)
            self._permits = None


class Permits:
    """Counts sequences by pool.

    Args:
        num: sequences of the base model and of adapters on the shards; as many may wait
            for adapters of one source, and half as many for one adapter.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._num_for_adapter = max(num // 2, min(num, _LEAST_FOR_ADAPTER))
        self._taken: Counter[_Pool] = Counter()
        # Set while nobody holds a permit.
        self.idle = asyncio.Event()
        self.idle.set()

    def check(self) -> None:
        """Raise OverloadedError when not even one sequence of the base model may enter."""
        self._check_common(1)

    def take(self, num: int, waits_for: AdapterSelection | None = None) -> Permit:
        """Let ``num`` sequences in or raise OverloadedError.

        ``waits_for`` is the adapter that is not on the shards, if there is one.
        """
        if waits_for is None:
            self._check_common(num)
            pools: tuple[_Pool, ...] = (_COMMON,)
        else:
            pools = tuple(self._checked_pools(num, waits_for))
        for pool in pools:
            self._taken[pool] += num
        self.idle.clear()
        return Permit(self, num, pools)

    def _check_common(self, num: int) -> None:
        if self._taken[_COMMON] + num > self._num:
            raise OverloadedError(f"no permit for {num} sequences", public="")

    def _checked_pools(self, num: int, waits_for: AdapterSelection) -> Iterable[_Pool]:
        """The pools of adapters and sources; by token too, so that none learns of another's."""
        for source in dict.fromkeys(ref.source for ref in waits_for.refs):
            pool: _Pool = (source,)
            if self._taken[pool] + num > self._num:
                raise OverloadedError(
                    f"{self._taken[pool]} requests wait for adapters of the source {source} "
                    "already, as many as may; try again later"
                )
            yield pool
        for ref in dict.fromkeys(waits_for.refs):
            pool = (ref.source, ref.key, waits_for.token or "")
            if self._taken[pool] + num > self._num_for_adapter:
                raise OverloadedError(
                    f"{self._taken[pool]} requests wait for the adapter {ref} already, as many "
                    "as may; try again later"
                )
            yield pool

    def _leave(self, num: int, pools: tuple[_Pool, ...]) -> None:
        for pool in pools:
            self._taken[pool] -= num
            if not self._taken[pool]:
                del self._taken[pool]
        if not self._taken:
            self.idle.set()
