"""What each tenant has taken of its quotas, and the words for when there is no more.

Requests are counted when they come, tokens as they are known: those of a prompt before it
runs, those of an output as they are generated. Nothing is given back: a client that leaves
has had what was generated until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from lorax_contract.adapters import AdapterPart, AdapterRef, AdapterTiers, FetchedAdapter
from lorax_contract.errors import QuotaError
from lorax_contract.words import counted
from lorax_router.service.callers import Caller, Quotas
from lorax_router.service.keys.bucket import TokenBucket

# When it makes sense to ask again for place in the store, which nobody can know.
_STORE_RETRY_S = 60

# What there are quotas of, a minute: Quotas has their names.
KINDS = ("requests", "tokens", "fetches")
# What was taken when, elsewhere.
Before = deque[tuple[float, float]]
_NOTHING: Mapping[str, Before] = {}
# Tenants that are remembered that asked elsewhere and never here.
_MAX_BEFORE = 10_000

Tiers = Callable[[Sequence[AdapterPart]], Awaitable[AdapterTiers]]


@dataclass(frozen=True, slots=True)
class _StoredAdapter:
    """What a tenant's fetch put in the store."""

    part: AdapterPart
    num_bytes: int


class TenantMeter:
    """The account of one tenant; without quotas it takes everything."""

    def __init__(
        self,
        quotas: Quotas,
        clock: Callable[[], float],
        concurrent_fetches: int | None = None,
        before: Mapping[str, Before] = _NOTHING,
    ) -> None:
        self._clock = clock
        # Of those whom the keys say nothing else of.
        self._usual_fetches = concurrent_fetches
        self._fetch_ended = asyncio.Event()
        self._buckets: dict[str, TokenBucket] = {}
        # By name: how often it is asked for now, and what it put in the store.
        self._asking: Counter[str] = Counter()
        self._stored: dict[str, _StoredAdapter] = {}
        self.quotas = Quotas()
        self.adopt(quotas, before)

    def adopt(self, quotas: Quotas, before: Mapping[str, Before] = _NOTHING) -> None:
        """Count by other quotas from now on; what was taken stays taken.

        ``before`` is what was taken elsewhere, by kind, of what had no quota here until now.
        """
        self.quotas = quotas
        for kind in KINDS:
            per_minute: int | None = getattr(quotas, f"{kind}_per_minute")
            if per_minute is None:
                self._buckets.pop(kind, None)
            elif (bucket := self._buckets.get(kind)) is not None:
                bucket.set_rate(per_minute)
            else:
                self._buckets[kind] = TokenBucket(per_minute, self._clock, before.get(kind, ()))

    # --- over several servers -------------------------------------------------------

    def taken(self) -> dict[str, float]:
        """Return what was taken here so far of what has a quota, by kind."""
        return {kind: bucket.taken for kind, bucket in self._buckets.items()}

    def take_elsewhere(self, kind: str, number: float) -> None:
        """Count what another server gave the tenant."""
        if (bucket := self._buckets.get(kind)) is not None:
            bucket.take_elsewhere(number)

    # --- requests -----------------------------------------------------------------

    def check(self) -> None:
        """Raise QuotaError if a request that comes now is refused."""
        self._check("requests", "request", "requests")
        self._check("tokens", "token", "tokens")

    def start_request(self) -> None:
        """Count a request; raises QuotaError, and counts nothing then."""
        self.check()
        self._take("requests", 1)

    def start_prompt(self, num_tokens: int) -> None:
        """Count a prompt before it runs; raises QuotaError if others took all meanwhile."""
        self._check("tokens", "token", "tokens")
        self.generated(num_tokens)

    def generated(self, num_tokens: int) -> None:
        """Count tokens that are there."""
        self._take("tokens", num_tokens)

    def _take(self, kind: str, number: int) -> None:
        if (bucket := self._buckets.get(kind)) is not None:
            bucket.take(number)

    def _check(self, kind: str, one: str, many: str) -> None:
        _check(self._buckets.get(kind), one, many)

    # --- adapters -----------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def fetching(self, ref: AdapterRef, tiers: Tiers) -> AsyncIterator[None]:
        """Within, a source is asked for an adapter; raises QuotaError instead.

        What the tenant asks at the same time for the same name counts once. Waits while as much
        is fetched for the tenant as may be at once: the places that are left are others'.
        ``tiers`` says what of some adapters still lies in the store.
        """
        name = str(ref)
        if not self._asking[name]:
            await self._check_store(name, tiers)
        while not self._asking[name] and not self._may_fetch():
            self._fetch_ended.clear()
            await self._fetch_ended.wait()
        if not self._asking[name]:
            self._check("fetches", "adapter fetch", "adapter fetches")
            self._take("fetches", 1)
        self._asking[name] += 1
        try:
            yield
        finally:
            self._asking[name] -= 1
            if not self._asking[name]:
                del self._asking[name]
                self._fetch_ended.set()

    def _may_fetch(self) -> bool:
        own = self.quotas.concurrent_fetches
        most = self._usual_fetches if own is None else own
        return most is None or len(+self._asking) < most

    def fetched(self, ref: AdapterRef, adapter: FetchedAdapter) -> None:
        """Count what a fetch put in the store: by name, what the name leads to now."""
        if adapter.downloaded and self.quotas.store_bytes is not None:
            self._stored[str(ref)] = _StoredAdapter(adapter.part, adapter.disk_bytes)

    async def _check_store(self, name: str, tiers: Tiers) -> None:
        """Refuse further adapters to a tenant whose adapters in the store are too large together.

        What has left the store meanwhile does not count any more.
        """
        most = self.quotas.store_bytes
        if most is None or name in self._stored or self._num_stored() < most:
            return
        on_disk = (await tiers([each.part for each in self._stored.values()])).disk
        self._stored = {
            name: each for name, each in self._stored.items() if on_disk.get(each.part.store_digest)
        }
        if self._num_stored() >= most:
            raise QuotaError(
                f"the quota of {most} bytes of adapters in the store is used up by "
                f"{counted(len(self._stored), 'adapter')}; use those, or ask the operator to "
                "unload some",
                retry_after_s=_STORE_RETRY_S,
            )

    def _num_stored(self) -> int:
        return sum(each.num_bytes for each in self._stored.values())


class Meters:
    """The meters of all tenants, by name; they last when the keys are read again."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        concurrent_fetches: int | None = None,
    ) -> None:
        self._clock = clock
        self._concurrent_fetches = concurrent_fetches
        self._meters: dict[str, TenantMeter] = {}
        # What tenants took elsewhere that never asked here, by tenant and kind.
        self._before: dict[str, dict[str, Before]] = {}

    def of(self, caller: Caller) -> TenantMeter:
        """Return the meter of a caller's tenant, by the quotas that the caller came with."""
        meter = self._meters.get(caller.tenant)
        if meter is None:
            before = self._before.pop(caller.tenant, _NOTHING)
            meter = TenantMeter(caller.quotas, self._clock, self._concurrent_fetches, before)
            self._meters[caller.tenant] = meter
        elif meter.quotas != caller.quotas:
            meter.adopt(caller.quotas)
        return meter

    # --- over several servers -------------------------------------------------------

    def taken(self) -> dict[str, float]:
        """Return what was taken here so far of what has a quota, by ``kind:tenant``."""
        return {
            f"{kind}:{tenant}": number
            for tenant, meter in self._meters.items()
            for kind, number in meter.taken().items()
        }

    def take_elsewhere(self, amounts: Mapping[str, float]) -> None:
        """Count what other servers gave tenants since the last call, by ``kind:tenant``."""
        for key, number in amounts.items():
            kind, _, tenant = key.partition(":")
            if (meter := self._meters.get(tenant)) is not None:
                meter.take_elsewhere(kind, number)
            else:
                self._note(tenant, kind, number)

    def _note(self, tenant: str, kind: str, number: float) -> None:
        """Keep what a tenant took that has no meter here: of the last minute, by the second."""
        now = self._clock()
        if tenant not in self._before and len(self._before) >= _MAX_BEFORE:
            self._before.pop(next(iter(self._before)))
        events = self._before.setdefault(tenant, {}).setdefault(kind, deque(maxlen=60))
        if events and now - events[-1][0] < 1.0:
            now, earlier = events.pop()
            number += earlier
        events.append((now, number))


UNMETERED = TenantMeter(Quotas(), time.monotonic)


def _check(bucket: TokenBucket | None, one: str, many: str) -> None:
    if bucket is None or not (wait_s := bucket.wait_s()):
        return
    seconds, most = max(1, math.ceil(wait_s)), bucket.per_minute
    raise QuotaError(
        f"the quota of {most} {one if most == 1 else many} a minute is used up; try again in "
        f"{counted(seconds, 'second')}",
        retry_after_s=seconds,
    )
