"""The index: bytes counted whatever happens, shared by processes, made anew when damaged."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.adapter_files import StoredFile
from lorax_shard.store.index import BEFORE_ALL, NameRecord
from lorax_shard.store.store import AdapterStore, StoredAdapter

SIZE = 100


def put(store: AdapterStore, name: str) -> StoredAdapter:
    data = (name.encode() * SIZE)[:SIZE]
    with store.fetching(f"version-of-{name}") as staging:
        store.make_room(SIZE, staging)
        (staging.folder / "file").write_bytes(data)
        facts = StoredFile(name="file", size=SIZE, sha256=hashlib.sha256(data).hexdigest())
        return store.commit(staging, [facts], 1.0)


def index_of(store: AdapterStore) -> Path:
    return store.root / "index.sqlite3"


def overwrite(path: Path) -> None:
    path.write_bytes(b"this is no database" * 100)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil_a_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes([0xFF]) * (path.stat().st_size - 4096))


def of_another_version(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TABLE staging")
    connection.execute("PRAGMA user_version = 77")
    connection.close()


DAMAGES = [overwrite, truncate, empty, spoil_a_page, of_another_version, Path.unlink]


def settled(store: AdapterStore) -> None:
    """Have everything in the one file, as a power cut would find it."""
    store.index.close()
    for suffix in ("-wal", "-shm"):
        assert not index_of(store).with_name(f"index.sqlite3{suffix}").exists()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("is_open", [True, False])
def test_a_damaged_index_is_made_anew_from_the_entries(
    store: AdapterStore, damage: Callable[[Path], None], is_open: bool
) -> None:
    entries = [put(store, name) for name in "abc"]
    settled(store)
    if is_open:
        assert store.used_bytes() == 3 * SIZE
    damage(index_of(store))
    others = AdapterStore(store.root, max_bytes=store.max_bytes)
    others.sweep()
    for each in (others, store):
        assert each.index.sizes(entry.digest for entry in entries) == {
            entry.digest: SIZE for entry in entries
        }
        assert each.used_bytes() == 3 * SIZE
        each.count_use(entries[0].digest)
    put(store, "d")
    assert others.used_bytes() == 4 * SIZE
    others.check()


def test_entries_of_a_store_without_an_index_are_taken_in(tmp_path: Path) -> None:
    """As an earlier version left it: the records beside are of no use."""
    store = AdapterStore(tmp_path, max_bytes=1 << 20)
    entry = put(store, "a")
    settled(store)
    index_of(store).unlink()
    (tmp_path / "uses").mkdir()
    again = AdapterStore(tmp_path, max_bytes=1 << 20)
    again.sweep()
    assert again.index.sizes([entry.digest]) == {entry.digest: SIZE}
    assert not (tmp_path / "uses").exists()


def test_a_disk_that_cannot_be_written_is_said_in_words(store: AdapterStore) -> None:
    put(store, "a")
    settled(store)
    index_of(store).rename(store.root / "elsewhere")
    index_of(store).mkdir()
    with pytest.raises(AdapterUnavailableError, match="cannot write") as caught:
        store.used_bytes()
    assert caught.value.reason is Reason.STORE_FULL


def test_threads_and_stores_that_work_at_once_count_every_byte(tmp_path: Path) -> None:
    stores = [AdapterStore(tmp_path, max_bytes=10 * SIZE) for _ in range(3)]

    def work(number: int) -> None:
        store = stores[number % 3]
        digest = put(store, f"{number % 12:02}").digest
        store.count_use(digest)
        if number % 5 == 0:
            store.remove(digest)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(60)))
    assert stores[0].used_bytes() == SIZE * len(stores[0].entries()) <= 10 * SIZE
    stores[0].check()


def test_processes_that_work_at_once_count_every_byte(tmp_path: Path) -> None:
    pids = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                store = AdapterStore(tmp_path, max_bytes=8 * SIZE)
                for name in range(number, number + 10):
                    store.count_use(put(store, f"{name:02}").digest)
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    store = AdapterStore(tmp_path, max_bytes=8 * SIZE)
    store.sweep()
    store.check()
    assert store.used_bytes() == SIZE * len(store.entries()) <= 8 * SIZE


def statements(store: AdapterStore, work: Callable[[], object]) -> int:
    """Count the steps that SQLite takes for ``work``."""
    connection = store.index._db._open()
    steps = [0]

    def count() -> int:
        steps[0] += 1
        return 0

    connection.set_progress_handler(count, 10)
    work()
    connection.set_progress_handler(None, 10)
    return steps[0]


def fill(store: AdapterStore, number: int) -> None:
    """Add rows of entries that have no files."""

    def work(db: sqlite3.Connection) -> None:
        db.executemany(
            "INSERT INTO entries VALUES (?, 1, 1.0, 1.0, ?, ?)",
            ((f"{each:064}", float(each), 1.0 + each) for each in range(number)),
        )

    store.index._db.change(work)


def test_work_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """Counted in SQLite's own steps: no machine is slow enough to break it."""
    few, many = (costs(AdapterStore(tmp_path / str(n), max_bytes=1 << 30), n) for n in (10, 20_000))
    assert all(more <= less + 2 for less, more in zip(few, many, strict=True)), (few, many)


def costs(store: AdapterStore, number: int) -> list[int]:
    fill(store, number)
    wanted = [f"{each:064}" for each in range(10)]
    with store.fetching("v") as staging:
        works: list[Callable[[], object]] = [
            lambda: store.make_room(SIZE, staging),
            lambda: put(store, "a"),
            lambda: store.count_use(wanted[0]),
            lambda: store.index.sizes(wanted),
            lambda: store.remove(wanted[1]),
            store.used_bytes,
        ]
        return [statements(store, work) for work in works]


def test_an_eviction_looks_at_what_it_evicts_only(tmp_path: Path) -> None:
    costs = []
    for number in (10, 20_000):
        store = AdapterStore(tmp_path / str(number), max_bytes=number)
        fill(store, number)
        with store.fetching("v") as staging:
            costs.append(statements(store, partial(store.make_room, 3, staging)))
        assert store.used_bytes() == number - 3
        assert store.index.sizes(f"{each:064}" for each in range(4)) == {f"{3:064}": 1}
    assert costs[1] <= costs[0] + 5


def test_what_is_on_a_full_disk_is_served(store: AdapterStore) -> None:
    """SQLite refuses to write as it does where no byte fits."""
    entry = put(store, "a")
    name = NameRecord(
        realm="here", ref=AdapterRef.of("hub", "org/a"), version="1", digest=entry.digest,
        access="public", checked_at=9.0,
    )  # fmt: skip
    before = store.index.least_worth(BEFORE_ALL)
    connection = store.index._db._open()
    connection.execute("PRAGMA query_only = 1")
    store.count_use(entry.digest)
    store.index.wanted(name, "v1")
    with pytest.raises(AdapterUnavailableError) as caught:
        put(store, "b")
    assert caught.value.reason is Reason.STORE_FULL
    assert store.lease(entry.digest) is not None
    connection.execute("PRAGMA query_only = 0")
    assert store.index.least_worth(BEFORE_ALL) == before
    store.index.wanted(name, "v1")
    assert store.index.digest_of_version("v1") == entry.digest
