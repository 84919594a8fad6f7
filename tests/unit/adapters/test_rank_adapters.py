"""The adapter calls of one rank: what is held, read, let go, and who waits for whom."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_folders import write_adapter
from tests.helpers.in_loop import in_loop
from tests.unit.fetching.conftest import make_context

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterQuery,
    AdapterRef,
    AdapterUnavailableError,
    FetchedAdapter,
    LoadReport,
    Reason,
)
from lorax_contract.step import AdapterHandle
from lorax_shard.adapters import rank_adapters
from lorax_shard.adapters.rank_adapters import RankAdapters
from lorax_shard.fetching.client import Fetched
from lorax_shard.fetching.job import FetchJob
from lorax_shard.fetching.sources.interface import SourceSettings
from lorax_shard.fetching.sources.local import LocalSource
from lorax_shard.store.store import AdapterStore, Lease

FACTS = {"content_digest": "c" * 64, "device_bytes": 5000, "max_rank": 8, "vocab_size": 0}
ONE = AdapterHandle(1)
# Nothing on Linux gives way more than that.
LEAST_PRIORITY = 19


class Fetcher:
    """Fetches local adapters in this process."""

    def __init__(self, store: AdapterStore, root: Path) -> None:
        self._store = store
        self._source = LocalSource(SourceSettings(local_roots=(str(root),)))
        self.calls: list[tuple[str | None, bool]] = []
        self.is_started = self.is_closed = False
        self.error: AdapterUnavailableError | None = None

    def start(self) -> None:
        self.is_started = True

    async def fetch(self, ref: AdapterRef, token: str | None, *, refresh: bool) -> Fetched:
        self.calls.append((token, refresh))
        if self.error is not None:
            raise self.error
        outcome = FetchJob(self._store, self._source, make_context()).run(ref, token)
        lease = self._store.lease(outcome.digest)
        assert lease is not None
        return Fetched(
            ref=ref, version=outcome.version, digest=outcome.digest, folder=lease.entry.folder,
            bytes=lease.entry.size, files=(), tokenizer_files=lease.entry.tokenizer_files,
            facts=FACTS, access="public", timings={"resolve": 0.5}, downloaded=True, stale=False,
            valid_s=30.0, lease=lease,
        )  # fmt: skip

    async def close(self) -> None:
        self.is_closed = True


def own_priority() -> int:
    """How much the calling thread gives way."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


class ReadyAdapters:
    """Notes what it is asked; ``gate`` holds what is prepared."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.error: AdapterUnavailableError | None = None
        self.inside = threading.Semaphore(0)
        self.priorities: list[int] = []
        self.released: list[AdapterHandle] = []

    def prepare(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        self.priorities.append(own_priority())
        self.inside.release()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return LoadReport(device_bytes=int(handle))

    def release(self, handle: AdapterHandle) -> None:
        self.released.append(handle)

    def device_tier(self) -> dict[AdapterHandle, tuple[str, int]]:
        return {ONE: ("key", 7)}


class Copies:
    """Holds what it was told to."""

    def __init__(self) -> None:
        self.held = {"digest": 6}

    def sizes(self) -> dict[str, int]:
        return dict(self.held)

    def drop(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self.held.pop(digest, None)


class Parts:
    """A rank_adapters over a folder of adapters named by numbers."""

    def __init__(self, folder: Path) -> None:
        self.local = folder / "local"
        self.store = AdapterStore(folder / "store", max_bytes=1 << 20)
        self.lane, self.fetcher = ReadyAdapters(), Fetcher(self.store, self.local)
        self.copies = Copies()
        self.now_s = 1000.0
        self.rank_adapters = self.make(self.fetcher)

    def make(self, fetcher: Any) -> RankAdapters:
        lane: Any = self.lane
        copies: Any = self.copies
        return RankAdapters(lane, copies, self.store, fetcher, now=lambda: self.now_s)

    async def fetch(self, number: int, **options: Any) -> AdapterPart:
        write_adapter(self.local / str(number), seed=number)
        query = AdapterQuery(ref=AdapterRef.of("local", str(number)), **options)
        return (await self.rank_adapters.fetch(query)).part

    def is_held(self, part: AdapterPart) -> bool:
        """Whether the store may not remove the files; they are gone if it may."""
        return not self.store.remove(part.store_digest)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


def content(part: AdapterPart) -> AdapterContent:
    return AdapterContent(parts=(part,))


@in_loop
@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
async def test_preparing_gives_way_to_steps(parts: Parts) -> None:
    """However much the process as a whole gives way already."""
    part = await parts.fetch(0)
    before = own_priority()
    await parts.rank_adapters.prepare(ONE, content(part))
    assert parts.lane.priorities == [min(before + rank_adapters._NICE, LEAST_PRIORITY)]
    assert own_priority() == before


@in_loop
async def test_a_fetch_is_described_for_the_router(parts: Parts) -> None:
    write_adapter(parts.local / "0")
    query = AdapterQuery(ref=AdapterRef.of("local", "0"), token="hf_mine", refresh=True)
    fetched = await parts.rank_adapters.fetch(query)
    assert parts.fetcher.calls == [("hf_mine", True)]
    assert fetched.part.content_digest == FACTS["content_digest"]
    assert (fetched.device_bytes, fetched.max_rank, fetched.vocab_size) == (5000, 8, 0)
    assert fetched.text_files == ("chat_template.jinja", "tokenizer.json")
    assert fetched.valid_s == 30.0
    asked = ["chat_template.jinja", "vocab.json", "adapter_config.json", "../tokenizer.json"]
    text = await parts.rank_adapters.text(fetched.part.store_digest, asked)
    assert text == {"chat_template.jinja": b"{{ messages }}"}
    other = await parts.fetch(1)
    tiers = await parts.rank_adapters.tiers([AdapterPart("digest", fetched.part.store_digest)])
    assert tiers.disk == {fetched.part.store_digest: fetched.disk_bytes}
    assert (tiers.device, tiers.host) == ({ONE: ("key", 7)}, {"digest": 6})
    tiers = await parts.rank_adapters.tiers([other])
    assert (tiers.disk.keys(), tiers.host) == ({other.store_digest}, {})


@in_loop
async def test_the_bases_tokenizer_is_not_one_of_its_own(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FACTS, "is_bases_tokenizer", True)
    write_adapter(parts.local / "0")
    query = AdapterQuery(ref=AdapterRef.of("local", "0"))
    fetched = await parts.rank_adapters.fetch(query)
    assert fetched.text_files == ("chat_template.jinja",)


@in_loop
async def test_only_rank_0_fetches(parts: Parts) -> None:
    rank_adapters = parts.make(None)
    rank_adapters.start()
    with pytest.raises(AdapterUnavailableError, match="rank 0 fetches"):
        await rank_adapters.fetch(AdapterQuery(ref=AdapterRef.of("local", "0")))
    await rank_adapters.close()


@in_loop
async def test_what_was_fetched_last_stays_on_the_disk(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_adapters, "_NUM_HELD", 2)
    zero, one = await parts.fetch(0), await parts.fetch(1)
    assert await parts.fetch(0) == zero  # now the one fetched last
    two = await parts.fetch(2)
    assert not parts.is_held(one)
    assert parts.is_held(zero)
    assert parts.is_held(two)
    await parts.rank_adapters.release(ONE, [zero])
    assert parts.lane.released == [ONE]
    assert not parts.is_held(zero)
    parts.rank_adapters.start()
    await parts.rank_adapters.close()
    assert parts.fetcher.is_started
    assert parts.fetcher.is_closed
    assert not parts.is_held(two)


@in_loop
async def test_what_is_loaded_or_waited_for_in_vain_may_leave_the_disk(parts: Parts) -> None:
    loaded, old, young = [await parts.fetch(number) for number in range(3)]
    await parts.rank_adapters.prepare(ONE, content(loaded))
    assert not parts.is_held(loaded)
    parts.now_s += 61.0
    assert await parts.fetch(2) == young
    assert not parts.is_held(old)
    assert parts.is_held(young)
    await parts.rank_adapters.close()


@in_loop
async def test_a_small_store_takes_any_number_of_adapters_in_turn(parts: Parts) -> None:
    first = await parts.fetch(0)
    parts.store.max_bytes = 2 * parts.store.used_bytes()
    await parts.rank_adapters.prepare(ONE, content(first))
    for number in range(1, 6):
        await parts.rank_adapters.prepare(ONE, content(await parts.fetch(number)))
    # Two that nobody loads fill it.
    await parts.fetch(6)
    await parts.fetch(7)
    with pytest.raises(AdapterUnavailableError) as caught:
        await parts.fetch(8)
    assert caught.value.reason is Reason.STORE_FULL


@in_loop
async def test_files_that_are_gone_are_said_to_be(parts: Parts) -> None:
    with pytest.raises(AdapterUnavailableError) as caught:
        await parts.rank_adapters.text("0" * 64, ["tokenizer.json"])
    assert caught.value.reason is Reason.EVICTED


@in_loop
async def test_what_is_damaged_is_not_kept(parts: Parts) -> None:
    part = await parts.fetch(0)
    parts.lane.error = AdapterUnavailableError(Reason.REFUSED, "too odd")
    with pytest.raises(AdapterUnavailableError, match="too odd"):
        await parts.rank_adapters.prepare(ONE, content(part))
    assert parts.is_held(part)
    assert parts.lane.released == []
    parts.lane.error = AdapterUnavailableError(Reason.CORRUPT, "damaged")
    with pytest.raises(AdapterUnavailableError, match="damaged"):
        await parts.rank_adapters.prepare(ONE, content(part))
    assert parts.lane.released == [ONE]
    assert not parts.is_held(part)


@in_loop
async def test_what_is_forgotten_leaves_memory_and_disk(parts: Parts) -> None:
    part, other = await parts.fetch(0), await parts.fetch(1)
    parts.copies.held = {part.content_digest: 5, "another": 6}
    for _ in range(2):
        await parts.rank_adapters.release(ONE, [part])
        assert parts.copies.held == {"another": 6}
        assert parts.store.entry(part.store_digest) is None
        assert parts.store.entry(other.store_digest) is not None


@in_loop
async def test_files_that_somebody_reads_stay(parts: Parts) -> None:
    part = await parts.fetch(0)
    lease = parts.store.lease(part.store_digest)
    assert lease is not None
    with lease:
        await parts.rank_adapters.release(ONE, [part])
        assert parts.store.entry(part.store_digest) is not None


@in_loop
async def test_large_adapters_on_their_way_hold_up_nothing_but_each_other(parts: Parts) -> None:
    part = await parts.fetch(0)
    parts.lane.gate.clear()
    loading = [
        asyncio.create_task(parts.rank_adapters.prepare(AdapterHandle(number), content(part)))
        for number in range(1, 9)
    ]
    for _ in range(rank_adapters._NUM_THREADS):
        assert await asyncio.to_thread(parts.lane.inside.acquire, True, 30)
    await parts.rank_adapters.tiers([part])
    await parts.rank_adapters.text(part.store_digest, ["tokenizer.json"])
    await parts.rank_adapters.release(ONE)
    await parts.fetch(1)
    assert not any(task.done() for task in loading)
    # No more than these are parsed at a time.
    assert not parts.lane.inside.acquire(blocking=False)
    parts.lane.gate.set()
    assert [report.device_bytes for report in await asyncio.gather(*loading)] == list(range(1, 9))


class RankZeroStore:
    """Gives leases of rank 0's store in place of copies; notes what is copied."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self.here: list[AdapterPart] = []
        self.copied: list[AdapterPart] = []
        self.error: AdapterUnavailableError | None = None

    def held(self, part: AdapterPart) -> Lease | None:
        return self._store.lease(part.store_digest) if part in self.here else None

    def copy(self, wanted: FetchedAdapter) -> Lease:
        if self.error is not None:
            raise self.error
        self.copied.append(wanted.part)
        lease = self._store.lease(wanted.part.store_digest)
        assert lease is not None
        return lease


class FarRank:
    """A rank with a store and a fetcher of its own, and rank 0."""

    def __init__(self, folder: Path) -> None:
        self.zero, self.own = Parts(folder / "zero"), Parts(folder / "own")
        self.copier = RankZeroStore(self.zero.store)
        given: Any = self.copier
        lane: Any = self.own.lane
        host: Any = self.own.copies
        fetcher: Any = self.own.fetcher
        self.adapters = RankAdapters(lane, host, self.own.store, fetcher, given)

    async def wanted(self) -> FetchedAdapter:
        """Return what rank 0 has."""
        write_adapter(self.zero.local / "0", seed=0)
        return await self.zero.rank_adapters.fetch(AdapterQuery(ref=AdapterRef.of("local", "0")))

    async def fetch(self, source: str, wanted: FetchedAdapter) -> FetchedAdapter:
        query = AdapterQuery(ref=AdapterRef.of(source, "0"), wanted=wanted)
        return await self.adapters.fetch(query)


@in_loop
async def test_a_rank_elsewhere_reads_from_rank_0_what_its_own_folders_cannot_have(
    tmp_path: Path,
) -> None:
    rank = FarRank(tmp_path)
    wanted = await rank.wanted()
    # A folder of the same name is another one there.
    write_adapter(rank.own.local / "0", seed=3)
    answer = await rank.fetch("local", wanted)
    assert (answer.part, answer.downloaded) == (wanted.part, True)
    assert (rank.copier.copied, rank.own.fetcher.calls) == ([wanted.part], [])
    assert set(answer.timings) == {"download"}
    # It stays there until it is loaded.
    rank.zero.rank_adapters._let_go(wanted.part.store_digest)
    assert rank.zero.is_held(wanted.part)
    await rank.adapters.close()
    assert not rank.zero.is_held(wanted.part)


@in_loop
async def test_a_rank_elsewhere_reads_nothing_that_it_has(tmp_path: Path) -> None:
    rank = FarRank(tmp_path)
    wanted = await rank.wanted()
    rank.copier.here = [wanted.part]
    for source in ("local", "hub"):
        answer = await rank.fetch(source, wanted)
        assert (answer.part, answer.downloaded) == (wanted.part, False)
    assert (rank.copier.copied, rank.own.fetcher.calls) == ([], [])


@in_loop
async def test_a_source_that_all_reach_is_asked_by_each_rank_before_rank_0(tmp_path: Path) -> None:
    """What it cannot give is read from rank 0, and what it gives in another version."""
    rank = FarRank(tmp_path)
    wanted = await rank.wanted()
    # The stand-in for a hub reads folders.
    rank.own.fetcher.error = AdapterUnavailableError(Reason.NO_ACCESS, "no")
    assert (await rank.fetch("hub", wanted)).part == wanted.part
    assert len(rank.copier.copied) == 1
    rank.own.fetcher.error = None
    write_adapter(rank.own.local / "0", seed=3)
    assert (await rank.fetch("hub", wanted)).part == wanted.part
    assert len(rank.copier.copied) == 2
    write_adapter(rank.own.local / "0", seed=0)
    assert (await rank.fetch("hub", wanted)).part == wanted.part
    assert len(rank.copier.copied) == 2


@in_loop
async def test_why_rank_0_gives_nothing_is_said_of_the_adapter(tmp_path: Path) -> None:
    rank = FarRank(tmp_path)
    wanted = await rank.wanted()
    rank.copier.error = AdapterUnavailableError(Reason.CORRUPT, "it is not what rank 0 lists")
    with pytest.raises(AdapterUnavailableError, match="adapter local:0: it is not") as raised:
        await rank.fetch("local", wanted)
    assert raised.value.reason is Reason.CORRUPT
