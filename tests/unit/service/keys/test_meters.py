"""What tenants take of their quotas, and the words when there is no more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from tests.helpers.adapter_world import fetched, ref
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import AdapterPart, AdapterTiers
from lorax_contract.errors import QuotaError
from lorax_router.service.callers import ANYBODY, Caller, Quotas
from lorax_router.service.keys.meters import Meters, TenantMeter


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock | None = None, **quotas: int) -> TenantMeter:
    return TenantMeter(Quotas(**quotas), clock or Clock())


def test_a_request_too_many_is_told_the_quota_and_when_to_come_again() -> None:
    clock = Clock()
    taken = meter(clock, requests_per_minute=2)
    taken.start_request()
    taken.start_request()
    with pytest.raises(QuotaError, match="the quota of 2 requests a minute is used up") as caught:
        taken.start_request()
    assert caught.value.kind.retry_after_s == 30
    assert caught.value.kind.http_status == 429
    assert QuotaError.kind.retry_after_s == 1
    clock.now += 30
    taken.start_request()


def test_tokens_are_charged_as_they_are_counted_and_owed_beyond_the_quota() -> None:
    clock = Clock()
    taken = meter(clock, tokens_per_minute=60)
    taken.start_request()
    taken.start_prompt(50)
    for _ in range(70):
        taken.generated(1)
    with pytest.raises(QuotaError, match="the quota of 60 tokens a minute") as caught:
        taken.start_request()
    assert caught.value.kind.retry_after_s == 61
    with pytest.raises(QuotaError):
        taken.check()
    clock.now += 61
    taken.start_request()


def test_a_request_that_others_outran_runs_no_prompt() -> None:
    taken = meter(tokens_per_minute=60)
    taken.start_request()
    taken.start_request()
    taken.start_prompt(60)
    with pytest.raises(QuotaError):
        taken.start_prompt(1)


def test_a_refused_request_takes_nothing() -> None:
    clock = Clock()
    taken = meter(clock, requests_per_minute=60, tokens_per_minute=60)
    taken.start_prompt(120)
    for _ in range(100):
        with pytest.raises(QuotaError, match="tokens"):
            taken.start_request()
    clock.now += 62
    for _ in range(60):
        taken.check()
        taken.start_request()


def test_without_quotas_everything_is_free_and_with_other_ones_what_was_taken_counts() -> None:
    meters = Meters(Clock())
    for _ in range(1000):
        meters.of(ANYBODY).start_request()
        meters.of(ANYBODY).generated(10**9)
    one = Caller(tenant="a", quotas=Quotas(requests_per_minute=5))
    for _ in range(5):
        meters.of(one).start_request()
    with pytest.raises(QuotaError):
        meters.of(one).start_request()
    meters.of(Caller(tenant="b", quotas=Quotas(requests_per_minute=5))).start_request()
    more = Caller(tenant="a", quotas=Quotas(requests_per_minute=6))
    meters.of(more).start_request()
    with pytest.raises(QuotaError, match="6 requests"):
        meters.of(more).start_request()
    meters.of(Caller(tenant="a")).start_request()


class Disk:
    """What lies in the store."""

    def __init__(self, *digests: str) -> None:
        self.digests = set(digests)
        self.asked = 0

    async def __call__(self, parts: Sequence[AdapterPart]) -> AdapterTiers:
        self.asked += 1
        found = {p.store_digest: 1 for p in parts if p.store_digest in self.digests}
        return AdapterTiers(disk=found)


async def fetch(taken: TenantMeter, name: str, disk: Disk, **facts: object) -> None:
    async with taken.fetching(ref(name), disk):
        await asyncio.sleep(0)
    adapter = fetched(name, downloaded=True, **facts)
    disk.digests.add(adapter.part.store_digest)
    taken.fetched(ref(name), adapter)


@in_loop
async def test_sources_are_asked_so_often_a_minute_and_once_for_all_who_ask_together() -> None:
    clock = Clock()
    taken = meter(clock, fetches_per_minute=2)
    disk = Disk()
    await asyncio.gather(*(fetch(taken, "a", disk) for _ in range(20)))
    await fetch(taken, "b", disk)
    with pytest.raises(QuotaError, match="2 adapter fetches a minute"):
        await fetch(taken, "c", disk)
    # A refusal is nobody's way around it.
    asked = await asyncio.gather(
        *(fetch(taken, "c", disk) for _ in range(5)), return_exceptions=True
    )
    assert all(isinstance(each, QuotaError) for each in asked)
    clock.now += 30
    await fetch(taken, "c", disk)
    assert disk.asked == 0


@in_loop
async def test_stored_bytes_count_by_name_until_they_have_left_the_store() -> None:
    taken, disk = meter(store_bytes=100), Disk()
    await fetch(taken, "a", disk, disk_bytes=60)
    await fetch(taken, "a", disk, disk_bytes=60)
    await fetch(taken, "b", disk, disk_bytes=60)
    with pytest.raises(QuotaError, match="100 bytes of adapters in the store .* 2 adapters"):
        await fetch(taken, "c", disk, disk_bytes=60)
    # What it has may be asked for again.
    await fetch(taken, "a", disk, disk_bytes=60)
    disk.digests.discard("files of a")
    await fetch(taken, "c", disk, disk_bytes=60)


@in_loop
async def test_what_a_fetch_found_there_is_nobodys_charge() -> None:
    taken, disk = meter(store_bytes=100), Disk()
    for name in "abcdef":
        async with taken.fetching(ref(name), disk):
            pass
        taken.fetched(ref(name), fetched(name, disk_bytes=90, downloaded=False))


class Source:
    """Answers when told to, and counts who asks at once."""

    def __init__(self) -> None:
        self.asking: set[str] = set()
        self.most = 0
        self.go = asyncio.Event()

    async def fetch(self, taken: TenantMeter, name: str) -> None:
        async with taken.fetching(ref(name), Disk()):
            self.asking.add(name)
            self.most = max(self.most, len(self.asking))
            await self.go.wait()
            await asyncio.sleep(0)
            self.asking.discard(name)


@in_loop
async def test_a_tenant_has_so_many_adapters_fetched_at_once_and_the_others_wait() -> None:
    taken, other, source = meter(concurrent_fetches=2), meter(), Source()
    fetching = [asyncio.ensure_future(source.fetch(taken, name)) for name in "aabcdef"]
    others = [asyncio.ensure_future(source.fetch(other, name)) for name in "xyz"]
    for _ in range(20):
        await asyncio.sleep(0)
    # Whoever asks for the same name asks nothing more of the source.
    assert source.asking == {"a", "b", "x", "y", "z"}
    # One that waits may leave.
    fetching[-1].cancel()
    source.go.set()
    await asyncio.gather(*fetching[:-1], *others)
    assert source.most <= 2 + 3


@in_loop
async def test_who_waits_for_a_fetch_takes_nothing_yet() -> None:
    clock = Clock()
    taken, source = meter(clock, concurrent_fetches=1, fetches_per_minute=1), Source()
    first = asyncio.ensure_future(source.fetch(taken, "a"))
    second = asyncio.ensure_future(source.fetch(taken, "b"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert source.asking == {"a"}
    source.go.set()
    await first
    with pytest.raises(QuotaError, match="1 adapter fetch a minute"):
        await second


@in_loop
async def test_of_tenants_of_whom_nothing_is_said_the_servers_word_counts() -> None:
    meters, source = Meters(Clock(), concurrent_fetches=1), Source()
    caller = Caller(tenant="a")
    fetching = [asyncio.ensure_future(source.fetch(meters.of(caller), name)) for name in "ab"]
    for _ in range(20):
        await asyncio.sleep(0)
    assert source.asking == {"a"}
    # The keys were read again, and say more.
    more = Caller(tenant="a", quotas=Quotas(concurrent_fetches=2))
    fetching.append(asyncio.ensure_future(source.fetch(meters.of(more), "c")))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(source.asking) == 2
    source.go.set()
    await asyncio.gather(*fetching)


def test_what_was_taken_elsewhere_is_taken_here_and_not_told_again() -> None:
    clock = Clock()
    meters = Meters(clock)
    caller = Caller(tenant="a", quotas=Quotas(requests_per_minute=6, tokens_per_minute=60))
    meter = meters.of(caller)
    meter.start_request()
    meter.start_prompt(10)
    meters.take_elsewhere({"requests:a": 5.0, "tokens:a": 20.0, "fetches:a": 9.0})
    assert meters.taken() == {"requests:a": 1.0, "tokens:a": 10.0}
    with pytest.raises(QuotaError, match="6 requests a minute"):
        meter.start_request()
    clock.now += 10.0
    meter.start_request()


@pytest.mark.parametrize("late_s", [0.0, 5.0, 30.0])
def test_a_tenant_has_what_is_left_where_it_comes_later(late_s: float) -> None:
    """As if it had been there all the time."""
    clock = Clock()
    caller = Caller(tenant="a:b", quotas=Quotas(requests_per_minute=60))
    early, late = Meters(clock), Meters(clock)
    early.of(caller)
    for amount in (20.0, 3.0, 60.0):
        for each in (early, late):
            each.take_elsewhere({"requests:a:b": amount})
        clock.now += 0.4 if amount == 3.0 else 2.5
    clock.now += late_s
    waits = [each.of(caller)._buckets["requests"].wait_s() for each in (early, late)]
    # Within a second all is taken for one moment's.
    assert waits[0] == pytest.approx(waits[1], abs=1.0)


def test_tenants_that_never_come_here_take_little_room() -> None:
    clock = Clock()
    meters = Meters(clock)
    for number in range(20_000):
        meters.take_elsewhere({f"tokens:{number}": 1.0})
    for _ in range(500):
        clock.now += 0.25
        meters.take_elsewhere({"tokens:busy": 1.0})
    assert len(meters._before) <= 10_000
    # Of the last minute, and no older: four a second.
    busy = meters._before["busy"]["tokens"]
    assert len(busy) == 60
    assert sum(number for _, number in busy) <= 4 * 61
