"""The fetcher and its child process: isolation, limits, sharing, cancelling, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_folders import CONFIG, WANTED, WEIGHTS, adapter_files
from tests.helpers.fetchers import (
    POET,
    add,
    asked,
    failure,
    fetcher,
    hub,
    importable_verifiers,
    verifying,
)
from tests.helpers.hub_stub import COMMIT, StubHub
from tests.helpers.in_loop import in_loop
from tests.helpers.log_events import events_in

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.fetching.client import AdapterFetcher, Fetched
from lorax_shard.store.store import AdapterStore, Lease

# Fixtures of every test here.
__all__ = ["hub", "importable_verifiers"]


@in_loop
async def test_an_adapter_is_fetched_verified_and_described(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(POET) as fetched:
            assert fetched.version == COMMIT
            assert set(fetched.files) == WANTED
            assert set(fetched.tokenizer_files) == {"tokenizer.json", "chat_template.jinja"}
            assert fetched.chat_template == fetched.folder / "chat_template.jinja"
            assert fetched.bytes == sum(len(adapter_files()[name]) for name in WANTED)
            assert (fetched.folder / WEIGHTS).read_bytes() == adapter_files()[WEIGHTS]
            assert fetched.facts["rank"] == 8
            assert fetched.facts["told"] == {"gate": str(tmp_path / "gate")}
            assert set(fetched.timings) == {"queue", "resolve", "wait", "download", "verify"}
            assert (fetched.downloaded, fetched.stale, fetched.access) == (True, False, "public")
            assert not made.store.remove(fetched.digest)
        assert made.store.remove(fetched.digest)


@in_loop
async def test_a_new_version_leaves_the_old_one_to_who_began_with_it(
    hub: StubHub, tmp_path: Path
) -> None:
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(POET) as before:
            hub.repositories["org/poet"] = adapter_files(seed=1)
            hub.commits["org/poet"] = "1" * 40
            with await made.fetch(POET) as after:
                assert after.digest != before.digest
                assert (before.folder / WEIGHTS).read_bytes() == adapter_files(0)[WEIGHTS]
                assert (after.folder / WEIGHTS).read_bytes() == adapter_files(1)[WEIGHTS]


@in_loop
async def test_what_leaves_the_disk_for_others_is_an_event(
    hub: StubHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    size = sum(len(adapter_files()[name]) for name in WANTED)
    hub.repositories["org/pirate"] = adapter_files(seed=1)
    async with fetcher(hub, tmp_path, store_bytes=2 * size - 1) as made:
        with await made.fetch(POET) as poet:
            assert not events_in(caplog, "adapter_evicted")
        (await made.fetch(AdapterRef.of("hub", "org/pirate"))).release()
        (told,) = events_in(caplog, "adapter_evicted")
        assert (told["level"], told["digest"]) == ("disk", poet.digest)
        assert told["bytes"] >= poet.bytes


@in_loop
async def test_the_source_is_asked_each_time_and_an_unchanged_version_is_not_fetched(
    hub: StubHub, tmp_path: Path
) -> None:
    """Who asks remembers the answer, for as long as it says."""
    async with fetcher(hub, tmp_path, valid_s=60.0) as made:
        (await made.fetch(POET)).release()
        hub.requests.clear()
        with await made.fetch(POET) as again:
            assert (again.downloaded, again.valid_s) == (False, 60.0)
        assert len(hub.requests) == 1
        assert hub.downloads() == []


@in_loop
async def test_what_is_odd_about_an_adapter_is_in_the_log_once(
    hub: StubHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warning = "lora_alpha is 0 for every module: nothing is added there"
    config = {"r": 8, "warnings": [warning]}
    hub.repositories["org/poet"][CONFIG] = json.dumps(config).encode()
    async with fetcher(hub, tmp_path) as made:
        for _ in range(2):
            with await made.fetch(POET, refresh=True) as fetched:
                assert fetched.facts["warnings"] == [warning]
        told = [record.getMessage() for record in caplog.records]
        assert told.count(f"adapter hub:org/poet: {warning}") == 1


@in_loop
async def test_many_callers_wait_for_one_fetch(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path) as made:
        several = await asyncio.gather(*(made.fetch(POET) for _ in range(20)))
        assert sorted(hub.downloads()) == sorted(WANTED)
        assert len({fetched.digest for fetched in several}) == 1
        for fetched in several:
            fetched.release()


@in_loop
async def test_two_processes_fetch_the_same_adapter_once(hub: StubHub, tmp_path: Path) -> None:
    hub.held[WEIGHTS] = threading.Event()
    async with fetcher(hub, tmp_path) as one, fetcher(hub, tmp_path) as other:
        first = asyncio.create_task(one.fetch(POET))
        while WEIGHTS not in hub.downloads():
            await asyncio.sleep(0.005)
        second = asyncio.create_task(other.fetch(POET))
        await asked(hub, 2)
        hub.held[WEIGHTS].set()
        fetched = await asyncio.gather(first, second)
    assert sorted(hub.downloads()) == sorted(WANTED)
    assert [each.downloaded for each in fetched] == [True, False]
    assert fetched[0].folder == fetched[1].folder
    for each in fetched:
        each.release()


@in_loop
async def test_a_restart_finds_what_was_fetched(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path) as made:
        (await made.fetch(POET)).release()
    hub.requests.clear()
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(POET) as fetched:
            assert not fetched.downloaded
    assert hub.downloads() == []
    hub.failing_with = 503
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(POET) as fetched:
            assert fetched.stale
    async with fetcher(hub, tmp_path, offline=True) as made:
        with await made.fetch(POET) as fetched:
            assert fetched.stale


@in_loop
async def test_an_evicted_adapter_is_fetched_again(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(POET) as fetched:
            pass
        assert made.store.remove(fetched.digest)
        with await made.fetch(POET) as again:
            assert (again.digest, again.downloaded) == (fetched.digest, True)


BAD_ENDS = [
    ("refuse", Reason.REFUSED, "use_magic is not served", {}),
    ("fail", Reason.CRASHED, "RuntimeError", {}),
    ("crash", Reason.CRASHED, "SIGSEGV", {}),
    ("leave", Reason.CRASHED, "code 7", {}),
    ("hang", Reason.CRASHED, "not ready after 2 s", {"deadline_s": 2.0}),
    ("memory", Reason.TOO_LARGE, "more memory", {"memory_bytes": 256 << 20}),
    ("cpu", Reason.CRASHED, "of computing", {"cpu_s": 1}),
    ("disk", Reason.TOO_LARGE, "limit", {"max_file_bytes": 1 << 20}),
]


@pytest.mark.parametrize(("test", "reason", "words", "changes"), BAD_ENDS, ids=lambda v: str(v))
@in_loop
async def test_a_bad_adapter_fails_alone(
    hub: StubHub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    test: str,
    reason: Reason,
    words: str,
    changes: dict[str, Any],
) -> None:
    bad, held = add(hub, "bad", test), add(hub, "held", "hold", seed=5)
    if test == "hang":
        # This one has as little time as the other; it is not held.
        held = POET
    async with fetcher(hub, tmp_path, **changes) as made:
        neighbour = asyncio.create_task(made.fetch(held, "hf_secret"))
        if held is not POET:
            await verifying(tmp_path, seed=5)
        error = await failure(made, bad, "hf_secret")
        assert error.reason is reason
        assert words in error.text
        assert "hf_secret" not in f"{error.text} {error.detail} {caplog.text}"
        told = [r.getMessage() for r in caplog.records if error.text in r.getMessage()]
        assert [each.count("hub:org/bad") for each in told] == [1]
        (tmp_path / "gate").touch()
        (await neighbour).release()
        hub.requests.clear()
        again = await failure(made, bad, "hf_secret")
        assert (again.text, hub.requests) == (error.text, [])
        assert again.retry_after_s is not None
    assert not {entry.digest for entry in made.store.entries()} - {neighbour.result().digest}


@in_loop
async def test_chatter_on_the_childs_output_is_no_answer(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(add(hub, "loud", "chatter")) as fetched:
            assert fetched.facts["rank"] == 8


@in_loop
async def test_a_dead_child_is_started_again_and_nobody_notices(
    hub: StubHub, tmp_path: Path
) -> None:
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(add(hub, "assassin", "kill keeper")) as fetched:
            assert fetched.facts["rank"] == 8
        (child,) = _children()
        os.kill(child, signal.SIGKILL)
        with await made.fetch(POET, refresh=True) as fetched:
            assert _children() != [child]
            assert fetched.facts["rank"] == 8


@in_loop
async def test_a_child_that_hangs_is_replaced(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path, deadline_s=1.0) as made:
        (await made.fetch(POET)).release()
        (child,) = _children()
        os.kill(child, signal.SIGSTOP)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lorax_shard.fetching.child._BACKSTOP_S", -0.5)
            asking = asyncio.create_task(made.fetch(POET, refresh=True))
            while _children() == [child]:
                await asyncio.sleep(0.005)
            patch.undo()
            (await asking).release()
        assert _children() != [child]


@in_loop
async def test_a_child_that_does_not_start_is_said_in_words(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path, function="no.such.module:verify") as made:
        error = await failure(made, POET)
        assert error.reason is Reason.CRASHED
        assert "does not start" in error.text


@in_loop
async def test_ending_the_server_leaves_no_process(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path) as made:
        asking = asyncio.create_task(made.fetch(add(hub, "held", "hold")))
        await verifying(tmp_path)
        (child,) = _children()
        assert _group(child) > 1
    # The kernel takes its time with killed processes.
    while _group(child):
        await asyncio.sleep(0.01)
    with pytest.raises(AdapterUnavailableError):
        await asking


@in_loop
async def test_a_child_that_was_started_early_serves_the_first_fetch(
    hub: StubHub, tmp_path: Path
) -> None:
    async with fetcher(hub, tmp_path) as made:
        made.start()
        made.start()
        while not _children():
            await asyncio.sleep(0.01)
        (child,) = _children()
        (await made.fetch(POET)).release()
        assert _children() == [child]
    # The kernel takes its time with killed processes.
    while _group(child):
        await asyncio.sleep(0.01)


@in_loop
async def test_an_early_start_that_fails_or_is_ended_harms_nobody(
    hub: StubHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with fetcher(hub, tmp_path / "a", function="no.such.module:verify") as made:
        made.start()
        while "does not start" not in caplog.text:
            await asyncio.sleep(0.01)
        assert (await failure(made, POET)).reason is Reason.CRASHED
    async with fetcher(hub, tmp_path / "b") as made:
        made.start()
        await asyncio.sleep(0)
    assert _children() == []


async def _followed(hub: StubHub, folder: Path, made: AdapterFetcher) -> asyncio.Task[Fetched]:
    """Return a fetch that began when the one before it had lost its caller and not yet ended."""
    ref = add(hub, "held", "hold")
    first = asyncio.create_task(made.fetch(ref))
    await verifying(folder)
    first.cancel()
    second = asyncio.create_task(made.fetch(ref))
    await asyncio.gather(first, return_exceptions=True)
    await verifying(folder)
    return second


@in_loop
async def test_a_fetch_that_ends_leaves_the_one_that_followed_it_alone(
    hub: StubHub, tmp_path: Path
) -> None:
    async with fetcher(hub, tmp_path) as made:
        second = await _followed(hub, tmp_path, made)
        third = asyncio.create_task(made.fetch(AdapterRef.of("hub", "org/held")))
        await asyncio.sleep(0)
        (tmp_path / "gate").touch()
        for each in (second, third):
            (await each).release()
        # The third waited for the second.
        await asked(hub, 2, "held")
        assert hub.requests.count("GET /api/models/org/held/revision/main") == 2


@in_loop
async def test_a_fetch_that_followed_another_ends_with_the_server(
    hub: StubHub, tmp_path: Path
) -> None:
    async with fetcher(hub, tmp_path) as made:
        second = await _followed(hub, tmp_path, made)
    assert (await asyncio.gather(second, return_exceptions=True))[0].reason is Reason.TRANSIENT
    assert _children() == []


def _children() -> list[int]:
    """Return the living processes that this one started to fetch."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            command = stat.with_name("cmdline").read_bytes()
            if int(parent) == os.getpid() and state != "Z" and b"lorax_shard.fetching" in command:
                found.append(int(stat.parent.name))
    return found


def _group(group: int) -> int:
    """Count the living processes of a group."""
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, found = stat.read_text().rpartition(")")[2].split()[:3]
            count += int(found) == group and state != "Z"
    return count


@in_loop
async def test_a_cancelled_fetch_ends_unless_others_wait_for_it(
    hub: StubHub, tmp_path: Path
) -> None:
    ref = add(hub, "held", "hold")
    async with fetcher(hub, tmp_path) as made:
        leaves, stays = (asyncio.create_task(made.fetch(ref)) for _ in range(2))
        await verifying(tmp_path)
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        (tmp_path / "gate").touch()
        (await stays).release()
        assert hub.downloads().count(WEIGHTS) == 1
        (tmp_path / "gate").unlink()
        alone = asyncio.create_task(made.fetch(add(hub, "other", "hold", seed=1)))
        await verifying(tmp_path, seed=1)
        (child,) = _children()
        assert _group(child) > 1
        alone.cancel()
        await asyncio.gather(alone, return_exceptions=True)
        while _group(child) > 1:
            await asyncio.sleep(0.01)


@in_loop
async def test_only_so_many_at_once_and_the_rest_wait(hub: StubHub, tmp_path: Path) -> None:
    refs = [add(hub, f"held{number}", "hold", seed=number) for number in range(3)]
    async with fetcher(hub, tmp_path, concurrency=2, place_s=3600.0) as made:
        asking = [asyncio.create_task(made.fetch(ref)) for ref in refs]
        for number in range(2):
            await verifying(tmp_path, seed=number)
        assert not any("held2" in line for line in hub.requests)
        (tmp_path / "gate").touch()
        for task in asking:
            (await task).release()
        assert asking[2].result().timings["queue"] > asking[0].result().timings["queue"]


@in_loop
async def test_slow_sources_do_not_hold_up_others(hub: StubHub, tmp_path: Path) -> None:
    slow = [add(hub, f"slow{number}", "pass", seed=number) for number in range(3)]
    hub.seconds = {ref.id: float("inf") for ref in slow}
    async with fetcher(hub, tmp_path, concurrency=2, place_s=0.01) as made:
        asking = [asyncio.create_task(made.fetch(ref)) for ref in slow]
        # More than there are places.
        while len(hub.downloads()) < 3:
            await asyncio.sleep(0.005)
        (await made.fetch(POET)).release()
        assert not any(task.done() for task in asking)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


@in_loop
async def test_sources_that_do_not_exist_are_refused(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path) as made:
        error = await failure(made, AdapterRef.of("pbase", "x"))
        assert "pbase" in error.text
        assert error.reason is Reason.REFUSED


@in_loop
async def test_a_killed_fetch_is_taken_up_where_it_was(
    hub: StubHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.repositories["org/poet"] = adapter_files(num_floats=1 << 20)
    hub.breaks_once.add(WEIGHTS)
    async with fetcher(hub, tmp_path, stall_timeout_s=60.0, attempts=5, backoff_s=60.0) as made:
        asking = asyncio.create_task(made.fetch(POET, "hf_secret"))
        part = None
        # Half of it has come, and the fetch pauses before it goes on.
        while part is None or part.stat().st_size < 1 << 20:
            part = next((tmp_path / "store").glob(f"staging/*/{WEIGHTS}.part"), None)
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(POET, "hf_secret") as fetched:
            assert fetched.downloaded
        made.store.check()
    assert len(hub.ranges) == 1
    assert "hf_secret" not in caplog.text


@in_loop
async def test_a_lease_that_comes_too_late_is_given_back(hub: StubHub, tmp_path: Path) -> None:
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(POET) as fetched:
            pass
        store = made.store
        began, go_on, taken = threading.Event(), threading.Event(), threading.Event()

        class SlowStore:
            def lease(self, digest: str) -> Lease | None:
                began.set()
                assert go_on.wait(10)
                lease = store.lease(digest)
                taken.set()
                return lease

        made.store = SlowStore()  # type: ignore[assignment]
        asking = asyncio.create_task(made.fetch(POET))
        assert await asyncio.to_thread(began.wait, 10)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert store.remove(fetched.digest)
        # It was fetched anew meanwhile: the late lease is of an entry that is there.
        made.store = store
        (await made.fetch(POET)).release()
        go_on.set()
        assert await asyncio.to_thread(taken.wait, 10)
        # Given back by the loop: the entry can be removed once that was done.
        while not store.remove(fetched.digest):
            await asyncio.sleep(0.005)


def test_a_fetched_adapter_can_be_released_more_than_once(hub: StubHub, tmp_path: Path) -> None:
    async def fetch_one() -> tuple[Fetched, AdapterStore]:
        async with fetcher(hub, tmp_path) as made:
            return await made.fetch(POET), made.store

    fetched, store = asyncio.run(fetch_one())
    again = store.lease(fetched.digest)
    fetched.release()
    fetched.release()
    # The second call took nothing from others who hold it.
    assert not store.remove(fetched.digest)
    again.release()
    assert store.remove(fetched.digest)
