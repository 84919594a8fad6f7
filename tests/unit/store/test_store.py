"""The store: entries by content, leases, a bound in bytes, what is derived, sweeping."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.helpers.adapter_folders import tree

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.adapter_files import StoredFile
from lorax_shard.files import FileLock, acquire, size_of
from lorax_shard.store.index import NameRecord
from lorax_shard.store.store import AdapterStore, StoredAdapter

SIZE = 1000


def put(store: AdapterStore, name: str, size: int = SIZE, cost_s: float = 1.0) -> StoredAdapter:
    """Add an entry of ``size`` bytes whose content is made of ``name``."""
    import hashlib

    data = (name.encode() * size)[:size]
    with store.fetching(f"version-of-{name}") as staging:
        store.make_room(size, staging)
        (staging.folder / "file").write_bytes(data)
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
        (staging.folder / "file").write_bytes((first.folder / "file").read_bytes())
        second = store.commit(staging, first.files, 9.0)
    assert second == first
    assert store.entries() == [first]
    assert tree(store.root / "staging") == tree(store.root / "trash") == set()


def test_equal_content_is_shared_while_it_is_in_use(store: AdapterStore) -> None:
    first = put(store, "a")
    lease = store.lease(first.digest)
    assert lease is not None
    with store.fetching("another-name") as staging:
        (staging.folder / "file").write_bytes((first.folder / "file").read_bytes())
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


@pytest.mark.parametrize("digest", ["", ".", "..", "../staging", "/tmp", "a" * 65, "é" * 300, "\0"])
def test_what_can_be_no_name_of_an_entry_names_nothing_else(
    store: AdapterStore, digest: str
) -> None:
    entry = put(store, "a")
    before = tree(store.root / "entries")
    assert store.entry(digest) is None
    assert store.lease(digest) is None
    assert store.remove(digest)
    assert tree(store.root / "entries") == before
    assert store.entries() == [entry]


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
        small.count_use(put(small, name).digest)
    put(small, "d")
    assert names(small) == {"a", "c", "d"}
    assert small.used_bytes() <= small.max_bytes


def test_uses_survive_a_restart(small: AdapterStore) -> None:
    entries = {name: put(small, name) for name in "abc"}
    small.count_use(entries["a"].digest)
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


def test_what_was_dear_once_does_not_stay_for_ever(small: AdapterStore) -> None:
    put(small, "a", cost_s=2.0)
    for name in "bcdefghijklmnopqrstuvwxyz":
        small.count_use(put(small, name).digest)
    assert "a" not in names(small)


def test_used_entries_stay_and_the_refusal_says_so(small: AdapterStore) -> None:
    used = put(small, "b")
    lease = small.lease(used.digest)
    for name in "cdef":
        put(small, name)
    assert names(small) == {"b", "e", "f"}
    with pytest.raises(AdapterUnavailableError, match="in use") as caught:
        put(small, "g", size=3 * SIZE)
    assert caught.value.reason is Reason.STORE_FULL
    assert lease is not None
    lease.release()
    put(small, "g", size=3 * SIZE)


def test_fetches_at_once_do_not_pass_the_bound_together(small: AdapterStore) -> None:
    with small.fetching("one") as one, small.fetching("other") as other:
        small.make_room(2 * SIZE, one)
        with pytest.raises(AdapterUnavailableError):
            small.make_room(2 * SIZE, other)
        small.make_room(SIZE, other)
        # What it turns out to take counts in place of what was announced.
        small.make_room(SIZE, one)
        small.make_room(2 * SIZE, other)
    assert small.used_bytes() == 0


def test_what_never_fits_evicts_nobody(small: AdapterStore) -> None:
    put(small, "a")
    with pytest.raises(AdapterUnavailableError):
        put(small, "b", size=4 * SIZE)
    assert names(small) == {"a"}


def break_off(store: AdapterStore, version: str, size: int = 1 << 20) -> None:
    """Leave a fetch as one that the source ended."""
    with store.fetching(version) as staging:
        (staging.folder / "x.part").write_bytes(bytes(size))


def test_a_broken_off_fetch_gives_way_before_an_entry(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", max_bytes=3 << 20)
    put(store, "a")
    break_off(store, "old", 2 << 20)
    assert store.used_bytes() == SIZE + (2 << 20)
    put(store, "b", size=1 << 20)
    assert names(store) == {"a", "b"}
    assert tree(store.root / "staging") == set()
    assert store.used_bytes() == SIZE + (1 << 20)


def test_only_the_last_of_many_broken_off_fetches_are_kept(store: AdapterStore) -> None:
    for number in range(40):
        break_off(store, f"version {number:02}")
    left = {path.name for path in (store.root / "staging").iterdir()}
    assert 0 < len(left) <= 17
    assert left == {f"version {number:02}" for number in range(40 - len(left), 40)}
    assert len(list((store.root / "locks").iterdir())) == 0


def test_what_is_no_loss_is_not_kept(store: AdapterStore) -> None:
    break_off(store, "small", size=1000)
    assert tree(store.root / "staging") == set()
    assert store.used_bytes() == 0


def test_a_fetch_under_way_is_not_swept(store: AdapterStore) -> None:
    with store.fetching("now") as staging:
        (staging.folder / "x.part").write_bytes(b"x")
        AdapterStore(store.root, max_bytes=10, clock=lambda: time.time() + 1e6).sweep()
        assert (staging.folder / "x.part").exists()


def test_a_sweep_drops_old_leftovers_and_keeps_fresh_ones(store: AdapterStore) -> None:
    entry = put(store, "a")
    old = AdapterStore(store.root, max_bytes=store.max_bytes, clock=lambda: time.time() - 1e6)
    break_off(old, "old")
    break_off(store, "fresh")
    # What an earlier version left, or one that was killed: nothing is known of it.
    (store.root / "staging" / "unknown").mkdir()
    (store.root / "trash" / "t").mkdir()
    (store.root / "trash" / "t" / "file").write_bytes(b"x")
    (store.root / "entries" / "half").mkdir()
    (store.root / "locks" / "left").touch()
    store.sweep()
    assert tree(store.root / "staging") == {"fresh", "fresh/x.part"}
    assert tree(store.root / "trash") == set()
    assert store.entries() == [entry]
    assert {path.name for path in (store.root / "entries").iterdir()} == {entry.digest}
    assert tree(store.root / "locks") == set()


def test_no_lock_file_outlives_its_holders(store: AdapterStore) -> None:
    leases = [store.lease(put(store, "a").digest) for _ in range(3)]
    held = tree(store.root / "locks")
    assert len(held) == 1
    for lease in leases:
        assert lease is not None
        lease.release()
    assert tree(store.root / "locks") == set()


@pytest.mark.parametrize("before", [None, 0o755, 0o707])
def test_others_on_this_machine_cannot_read_it(tmp_path: Path, before: int | None) -> None:
    if before is not None:
        (tmp_path / "store").mkdir()
        (tmp_path / "store").chmod(before)
    AdapterStore(tmp_path / "store", max_bytes=SIZE)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


def test_what_an_operator_shares_with_a_group_stays_shared(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o750)
    AdapterStore(tmp_path / "store", max_bytes=SIZE)
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o750


def derive(store: AdapterStore, entry: StoredAdapter, name: str, size: int = SIZE) -> None:
    with store.fetching("derive") as staging:
        with staging.deriving() as target:
            (target / "normal").write_bytes(bytes(size))
            staging.name_derived(name)
        store.add_derived(staging, entry, name)


def test_what_is_derived_lies_with_its_entry_is_counted_and_goes_with_it(
    store: AdapterStore,
) -> None:
    entry = put(store, "a")
    assert not entry.has_derived("n")
    lease = store.lease(entry.digest)
    assert lease is not None
    # Readers do not keep it from being published.
    derive(store, entry, "n")
    assert (lease.entry.folder / "n" / "normal").read_bytes() == bytes(SIZE)
    assert store.index.sizes([entry.digest, "unknown"]) == {entry.digest: 2 * SIZE}
    # Who comes second changes nothing.
    derive(store, entry, "n", size=7)
    assert (lease.entry.folder / "n" / "normal").read_bytes() == bytes(SIZE)
    assert store.used_bytes() == 2 * SIZE
    store.check()
    lease.release()
    assert store.remove(entry.digest)
    derive(store, entry, "n")
    assert tree(store.root / "entries") == tree(store.root / "staging") == set()
    assert store.used_bytes() == 0


def test_what_is_derived_before_is_published_with_the_files(store: AdapterStore) -> None:
    import hashlib

    with store.fetching("v") as staging:
        (staging.folder / "file").write_bytes(b"x")
        with staging.deriving() as target:
            (target / "normal").write_bytes(b"y")
            staging.name_derived("n")
        with staging.deriving() as target:
            (target / "half").write_bytes(b"y")
        facts = StoredFile(name="file", size=1, sha256=hashlib.sha256(b"x").hexdigest())
        entry = store.commit(staging, [facts], 1.0, "n")
    assert tree(entry.folder) == {"file", "entry.json", "n", "n/normal"}
    assert store.used_bytes() == 2
    store.check()


def record(digest: str, **changes: object) -> NameRecord:
    values = {
        "realm": "here", "ref": AdapterRef.of("hub", "org/a"), "version": "1",
        "digest": digest, "access": "public", "checked_at": 5.0,
    }  # fmt: skip
    return NameRecord(**{**values, **changes})  # type: ignore[arg-type]


def test_names_are_remembered_per_realm(store: AdapterStore) -> None:
    entry = put(store, "a")
    known = record(entry.digest)
    store.index.wanted(known, None)
    assert store.index.name("here", known.ref) == known
    assert store.index.name("elsewhere", known.ref) is None
    assert store.index.name("here", AdapterRef.of("hub", "org/a", "v2")) is None
    store.index.forget_name("here", known.ref)
    assert store.index.name("here", known.ref) is None


def test_records_go_with_their_entry(store: AdapterStore) -> None:
    kept, gone = put(store, "a"), put(store, "b")
    for entry in (kept, gone):
        store.index.wanted(record(entry.digest, realm=entry.digest), entry.digest)
        store.index.set_verdict(entry.digest, "verifier", {"rank": 8})
    store.remove(gone.digest)
    # Too late: another process removed the entry meanwhile.
    store.index.wanted(record(gone.digest, realm="late"), "late")
    store.index.set_verdict(gone.digest, "late", {})
    for entry, there in ((kept, True), (gone, False)):
        assert (store.index.name(entry.digest, record("").ref) is not None) == there
        assert (store.index.digest_of_version(entry.digest) == entry.digest) == there
        assert (store.index.verdict(entry.digest, "verifier") == {"rank": 8}) == there
    assert store.index.name("late", record("").ref) is None
    assert store.index.digest_of_version("late") is None
    assert store.index.verdict(gone.digest, "late") is None
    assert store.index.verdict(kept.digest, "other") is None


@pytest.mark.timeout(20)
def test_a_lock_file_that_is_removed_while_somebody_waits_locks_all_the_same(
    tmp_path: Path,
) -> None:
    path, began = tmp_path / "lock", threading.Event()
    first = acquire(path)
    assert first is not None
    assert acquire(path, wait=False) is None

    def wait_for_it() -> FileLock | None:
        began.set()
        return acquire(path)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for_it)
        began.wait()
        first.release()
        second = waiting.result()
    assert second is not None
    assert path.exists()
    assert acquire(path, wait=False) is None
    second.release()
    assert not path.exists()


def test_a_shared_lock_stays_until_its_last_holder_leaves(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    one, other = acquire(path, shared=True), acquire(path, shared=True)
    assert one is not None
    assert other is not None
    one.release()
    one.release()
    assert acquire(path, wait=False) is None
    other.release()
    assert not path.exists()


def test_a_folder_that_goes_while_it_is_measured_counts_nothing(tmp_path: Path) -> None:
    """Another fetch may publish its staged folder at any moment."""
    assert size_of(tmp_path / "gone") == 0
    (tmp_path / "here").write_bytes(b"12345")
    assert size_of(tmp_path) == 5
