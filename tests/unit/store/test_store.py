"""The store: entries by content, leases, pins, a bound in bytes, records, sweeping."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.helpers.adapter_folders import tree

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.adapter_files import StoredFile
from lorax_shard.files import acquire, remove_unused_lock, size_of
from lorax_shard.store.index import NameRecord
from lorax_shard.store.store import AdapterStore, StoredAdapter

SIZE = 1000


def put(store: AdapterStore, name: str, size: int = SIZE, cost_s: float = 1.0) -> StoredAdapter:
    """Add an entry of ``size`` bytes whose content is made of ``name``."""
    import hashlib

    data = (name.encode() * size)[:size]
    with store.fetching(f"version-of-{name}") as staging:
        store.make_room(size, staging)
        (staging / "file").write_bytes(data)
        facts = StoredFile(name="file", size=size, sha256=hashlib.sha256(data).hexdigest())
        return store.commit(staging, [facts], cost_s)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def small(tmp_path: Path) -> AdapterStore:
    """A store with room for three entries."""
    return AdapterStore(tmp_path / "small", max_bytes=3 * SIZE, clock=Clock())


def names(store: AdapterStore) -> set[str]:
    return {(entry.folder / "file").read_text()[:1] for entry in store.entries()}


def test_an_entry_is_there_whole_and_again_after_reopening(store: AdapterStore) -> None:
    entry = put(store, "a")
    again = AdapterStore(store.root, max_bytes=store.max_bytes)
    assert again.entries() == [entry]
    again.check()
    assert tree(store.root / "staging") == set()


def test_equal_content_is_stored_once(store: AdapterStore) -> None:
    first = put(store, "a")
    with store.fetching("another-name") as staging:
        (staging / "file").write_bytes((first.folder / "file").read_bytes())
        second = store.commit(staging, first.files, 9.0)
    assert second == first
    assert store.entries() == [first]
    assert tree(store.root / "staging") == tree(store.root / "trash") == set()


def test_equal_content_is_shared_while_it_is_in_use(store: AdapterStore) -> None:
    first = put(store, "a")
    lease = store.lease(first.digest)
    assert lease is not None
    with store.fetching("another-name") as staging:
        (staging / "file").write_bytes((first.folder / "file").read_bytes())
        # Would wait for ever if it wanted the entry for itself.
        assert store.commit(staging, first.files, 1.0) == first
    lease.release()


def test_an_entry_in_use_stays(store: AdapterStore) -> None:
    entry = put(store, "a")
    lease = store.lease(entry.digest)
    assert lease is not None
    assert not store.remove(entry.digest)
    lease.release()
    lease.release()
    assert store.remove(entry.digest)
    assert store.lease(entry.digest) is None
    assert tree(store.root / "entries") == tree(store.root / "trash") == set()


def test_a_damaged_entry_is_none_and_is_replaced(store: AdapterStore) -> None:
    entry = put(store, "a")
    (entry.folder / "file").unlink()
    (entry.folder / "file").write_bytes(b"short")
    assert store.entry(entry.digest) is None
    assert store.lease(entry.digest) is None
    assert put(store, "a").digest == entry.digest
    store.check()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_what_was_lost_is_replaced_though_somebody_holds_it(store: AdapterStore, loss: str) -> None:
    entry = put(store, "a")
    lease = store.lease(entry.digest)
    assert lease is not None
    (entry.folder / "file").unlink()
    if loss == "gone":
        (entry.folder / "entry.json").unlink()
        entry.folder.rmdir()
    assert put(store, "a").digest == entry.digest
    assert store.entry(entry.digest) is not None
    assert not store.remove(entry.digest)
    lease.release()
    assert store.remove(entry.digest)


def test_check_finds_damage_of_equal_length(store: AdapterStore) -> None:
    entry = put(store, "a")
    (entry.folder / "file").chmod(0o644)
    (entry.folder / "file").write_bytes(bytes(SIZE))
    with pytest.raises(AssertionError, match="damaged"):
        store.check()


def test_the_least_recently_used_gives_way(small: AdapterStore) -> None:
    for name in "abc":
        put(small, name)
    for name in "ca":
        digest = put(small, name).digest
        lease = small.lease(digest)
        assert lease is not None
        lease.release()
    put(small, "d")
    assert names(small) == {"a", "c", "d"}
    assert small.used_bytes() <= small.max_bytes


def test_use_marks_survive_a_restart(small: AdapterStore) -> None:
    entries = {name: put(small, name) for name in "abc"}
    lease = small.lease(entries["a"].digest)
    assert lease is not None
    lease.release()
    again = AdapterStore(small.root, max_bytes=small.max_bytes, clock=small._clock)
    again.sweep()
    put(again, "d")
    assert names(again) == {"a", "c", "d"}


def test_what_is_dear_to_fetch_stays_longer(small: AdapterStore) -> None:
    put(small, "a", cost_s=60.0)
    put(small, "b", cost_s=0.1)
    put(small, "c", cost_s=0.1)
    put(small, "d")
    assert names(small) == {"a", "c", "d"}


def test_pinned_and_used_entries_stay_and_the_refusal_says_so(small: AdapterStore) -> None:
    pinned, used = put(small, "a"), put(small, "b")
    small.index.pin(pinned.digest)
    lease = small.lease(used.digest)
    for name in "cdef":
        put(small, name)
    assert names(small) == {"a", "b", "f"}
    with pytest.raises(AdapterUnavailableError, match="pinned or in use") as caught:
        put(small, "g", size=2 * SIZE)
    assert caught.value.reason is Reason.STORE_FULL
    assert lease is not None
    lease.release()
    small.index.unpin(pinned.digest)
    put(small, "g", size=2 * SIZE)


def test_what_never_fits_evicts_nobody(small: AdapterStore) -> None:
    put(small, "a")
    with pytest.raises(AdapterUnavailableError):
        put(small, "b", size=4 * SIZE)
    assert names(small) == {"a"}


def test_a_broken_off_fetch_gives_way_before_an_entry(small: AdapterStore) -> None:
    put(small, "a")
    (small.root / "staging" / "old").mkdir()
    (small.root / "staging" / "old" / "x.part").write_bytes(bytes(2 * SIZE))
    put(small, "b")
    assert names(small) == {"a", "b"}
    assert tree(small.root / "staging") == set()


def test_a_fetch_under_way_is_not_swept(store: AdapterStore) -> None:
    with store.fetching("now") as staging:
        (staging / "x.part").write_bytes(b"x")
        os.utime(staging / "x.part", (0, 0))
        AdapterStore(store.root, max_bytes=10).sweep()
        assert (staging / "x.part").exists()


def test_a_sweep_drops_old_leftovers_and_keeps_fresh_ones(store: AdapterStore) -> None:
    entry = put(store, "a")
    for name, age_s in (("old", 1e6), ("fresh", 0.0)):
        (store.root / "staging" / name).mkdir()
        path = store.root / "staging" / name / "x.part"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age_s,) * 2)
    (store.root / "trash" / "t").mkdir()
    (store.root / "trash" / "t" / "file").write_bytes(b"x")
    (store.root / "entries" / "half").mkdir()
    store.sweep()
    assert tree(store.root / "staging") == {"fresh", "fresh/x.part"}
    assert tree(store.root / "trash") == set()
    assert store.entries() == [entry]
    assert {path.name for path in (store.root / "entries").iterdir()} == {entry.digest}
    assert {path.name for path in (store.root / "locks").iterdir()} == {"store"}


def record(digest: str, **changes: object) -> NameRecord:
    values = {
        "realm": "here", "ref": AdapterRef.of("hub", "org/a"), "version": "1",
        "digest": digest, "access": "public", "checked_at": 5.0,
    }  # fmt: skip
    return NameRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_names_are_remembered_per_realm(store: AdapterStore) -> None:
    entry = put(store, "a")
    known = record(entry.digest)
    store.index.set_name(known)
    assert store.index.name("here", known.ref) == known
    assert store.index.name("elsewhere", known.ref) is None
    assert store.index.name("here", AdapterRef.of("hub", "org/a", "v2")) is None
    assert list(store.index.names()) == [known]
    store.index.forget_name("here", known.ref)
    assert store.index.name("here", known.ref) is None


def test_records_of_entries_that_are_gone_are_swept(store: AdapterStore) -> None:
    kept, gone = put(store, "a"), put(store, "b")
    for entry in (kept, gone):
        store.index.set_name(record(entry.digest, realm=entry.digest))
        store.index.set_version(f"version-{entry.digest}", entry.digest)
        store.index.set_verdict(entry.digest, "verifier", {"rank": 8})
        store.index.pin(entry.digest)
    store.remove(gone.digest)
    store.sweep()
    left = [path for kind in store.index.KINDS for path in (store.root / kind).iterdir()]
    assert len(left) == len(store.index.KINDS)
    assert all(kept.digest in path.read_text() for path in left)
    assert store.index.verdict(kept.digest, "verifier") == {"rank": 8}
    assert store.index.verdict(kept.digest, "other") is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"ref": 1}', '{"uses": "x"}', "\xff"])
def test_a_damaged_record_means_nothing(store: AdapterStore, text: str) -> None:
    entry = put(store, "a")
    store.index.set_name(record(entry.digest))
    store.index.set_version("v", entry.digest)
    for kind in ("names", "versions", "uses"):
        for path in (store.root / kind).iterdir():
            path.write_text(text, encoding="latin-1")
    assert list(store.index.names()) == []
    assert store.index.digest_of_version("v") is None
    assert store.index.use(entry.digest) is None
    store.sweep()
    assert store.entries() == [entry]


def test_a_lock_file_that_is_removed_while_somebody_waits_locks_all_the_same(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    first = acquire(path)
    assert first is not None
    assert acquire(path, wait=False) is None
    remove_unused_lock(path)
    assert path.exists()
    first.release()
    remove_unused_lock(path)
    assert not path.exists()
    second = acquire(path)
    assert second is not None
    assert path.exists()
    second.release()


def test_a_folder_that_goes_while_it_is_measured_counts_nothing(tmp_path: Path) -> None:
    """Another fetch may publish its staged folder at any moment."""
    assert size_of(tmp_path / "gone") == 0
    (tmp_path / "here").write_bytes(b"12345")
    assert size_of(tmp_path) == 5
