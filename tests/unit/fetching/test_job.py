"""One fetch: phases, sharing, verdicts, last known versions; ended at any step, it leaves
nothing that is half there."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_folders import WANTED, WEIGHTS, adapter_files, tree, write_adapter
from tests.unit.fetching.conftest import make_context

from lorax_contract.adapters import Access, AdapterRef, AdapterUnavailableError, Reason
from lorax_contract.errors import ValidationError
from lorax_shard.adapter_files import StoredFile
from lorax_shard.fetching.job import FetchJob, FetchOutcome, Verifier, VerifySettings
from lorax_shard.fetching.sources.interface import FetchContext, Resolved, Source, SourceSettings
from lorax_shard.fetching.sources.local import LocalSource
from lorax_shard.files import size_of
from lorax_shard.store.store import AdapterStore

REF = AdapterRef.of("local", "poet")
# More than one chunk, so that a fetch can end between two of them.
FLOATS = 3 << 18


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "root" / "poet", num_floats=FLOATS)
    return tmp_path / "root"


class SettledSource(LocalSource):
    """Trusts file times at once, and can be out of order."""

    def __init__(self, root: Path, access: Access = "public") -> None:
        super().__init__(SourceSettings(local_roots=(str(root),)))
        self.fails: AdapterUnavailableError | None = None
        self.num_fetches = 0
        self._access = access

    def resolve(self, ref: AdapterRef, token: str | None, context: FetchContext) -> Resolved:
        if self.fails is not None:
            raise self.fails
        resolved = super().resolve(ref, token, context)
        return dataclasses.replace(resolved, lasting=True, access=self._access)

    def fetch(
        self, ref: AdapterRef, resolved: Resolved, folder: Path, context: FetchContext
    ) -> tuple[StoredFile, ...]:
        self.num_fetches += 1
        return super().fetch(ref, resolved, folder, context)


class CountingVerify:
    """Says what it was told to say, and counts."""

    def __init__(self, derived: str = "normal form", error: Exception | None = None) -> None:
        self.folders: list[Path] = []
        self.derived = derived
        self.error = error

    def __call__(self, folder: Path, target: Path, context: Mapping[str, Any]) -> Mapping[str, Any]:
        self.folders.append(folder)
        there = {path.name for path in folder.iterdir() if path.is_file()}
        assert there - {"entry.json"} == WANTED
        (target / "normal").write_bytes(b"made of it")
        if self.error:
            raise self.error
        return {"rank": context["rank"], "derived": self.derived}


FACTS = {"rank": 8, "derived": "normal form"}


def run(
    store: AdapterStore, source: Source, verify: CountingVerify | None = None, key: str = "v"
) -> FetchOutcome:
    verifier = Verifier(verify, {"rank": 8}, key) if verify else None
    return FetchJob(store, source, make_context(), verifier).run(REF, None)


def test_a_second_fetch_of_the_same_version_brings_nothing(root: Path, store: AdapterStore) -> None:
    source, verify = SettledSource(root), CountingVerify()
    first, second = (run(store, source, verify) for _ in range(2))
    assert (first.downloaded, second.downloaded) == (True, False)
    assert first.digest == second.digest
    assert first.facts == second.facts == FACTS
    assert (source.num_fetches, len(verify.folders)) == (1, 1)
    assert set(first.timings) == {"resolve", "wait", "download", "verify"}
    assert all(seconds >= 0 for seconds in first.timings.values())
    store.check()


def test_an_edit_in_place_makes_a_new_entry_and_leaves_the_old(
    root: Path, store: AdapterStore
) -> None:
    source = SettledSource(root)
    before = run(store, source)
    write_adapter(root / "poet", seed=1, num_floats=FLOATS)
    after = run(store, source)
    assert after.digest != before.digest
    old = store.entry(before.digest)
    assert old is not None
    assert (old.folder / WEIGHTS).read_bytes() == adapter_files(0, FLOATS)[WEIGHTS]


def test_two_names_with_equal_content_share_an_entry(root: Path, store: AdapterStore) -> None:
    write_adapter(root / "twin", num_floats=FLOATS)
    source, verify = SettledSource(root), CountingVerify()
    one = run(store, source, verify)
    verifier = Verifier(verify, {"rank": 8}, "v")
    two = FetchJob(store, source, make_context(), verifier).run(
        AdapterRef.of("local", "twin"), None
    )
    assert one.digest == two.digest
    assert one.version != two.version
    assert len(store.entries()) == len(verify.folders) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("option use_magic is not served"), Reason.REFUSED),
        (ValidationError("option use_magic is not served"), Reason.REFUSED),
        (MemoryError(), Reason.TOO_LARGE),
        (AdapterUnavailableError(Reason.CORRUPT, "use_magic"), Reason.CORRUPT),
    ],
)
def test_what_the_verifier_refuses_is_not_kept(
    root: Path, store: AdapterStore, error: Exception, reason: Reason
) -> None:
    with pytest.raises(AdapterUnavailableError) as caught:
        run(store, SettledSource(root), CountingVerify(error=error))
    assert caught.value.reason is reason
    assert reason is Reason.TOO_LARGE or "use_magic" in caught.value.text
    assert store.entries() == []
    assert tree(store.root / "staging") == set()


def test_another_verifier_judges_a_stored_adapter_anew(root: Path, store: AdapterStore) -> None:
    source, verify = SettledSource(root), CountingVerify()
    run(store, source, verify)
    with pytest.raises(AdapterUnavailableError):
        run(store, source, CountingVerify(error=ValueError("no")), key="of another base model")
    assert len(store.entries()) == 1
    run(store, source, verify, key="of a third")
    assert len(verify.folders) == 2


def test_the_key_of_a_verdict_follows_function_and_context() -> None:
    settings = [
        VerifySettings(function="os.path:join"),
        VerifySettings(function="os.path:join", context={"rank": 8}),
        VerifySettings(function="os.path:split"),
    ]
    loaded = [each.load() for each in settings]
    assert len({each.key for each in loaded if each is not None}) == 3
    assert loaded[0] is not None
    assert loaded[0].function is os.path.join
    assert VerifySettings().load() is None


PASSING = AdapterUnavailableError(Reason.TRANSIENT, "the source is out of reach")
GONE = AdapterUnavailableError(Reason.NOT_FOUND, "it is gone")


@pytest.mark.parametrize("access", ["public", "server"])
def test_while_the_source_is_out_of_reach_the_last_version_is_served(
    root: Path, store: AdapterStore, access: Access
) -> None:
    source = SettledSource(root, access)
    before = run(store, source, CountingVerify())
    source.fails = PASSING
    after = run(store, source, CountingVerify())
    assert (after.digest, after.stale, before.stale) == (before.digest, True, False)


def test_an_outage_does_not_open_what_needed_a_token(root: Path, store: AdapterStore) -> None:
    source = SettledSource(root, "token")
    run(store, source)
    source.fails = PASSING
    with pytest.raises(AdapterUnavailableError, match="out of reach"):
        run(store, source)


def test_an_outage_does_not_bring_back_what_was_removed(root: Path, store: AdapterStore) -> None:
    source = SettledSource(root)
    run(store, source)
    for error in (GONE, PASSING):
        source.fails = error
        with pytest.raises(AdapterUnavailableError) as caught:
            run(store, source)
        assert caught.value is error


def test_a_store_without_room_says_so(root: Path, tmp_path: Path) -> None:
    small = AdapterStore(tmp_path / "small", max_bytes=1 << 20)
    with pytest.raises(AdapterUnavailableError) as caught:
        run(small, SettledSource(root))
    assert caught.value.reason is Reason.STORE_FULL


def in_child(work: Callable[[], object]) -> int:
    """Run ``work`` in a forked process and return how that ended."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fetch_with_hook(
    root: Path, store_dir: Path, on_step: Callable[[str], None], key: str = "v"
) -> FetchOutcome:
    store = AdapterStore(store_dir, max_bytes=1 << 30, on_step=on_step)
    context = make_context()
    context.on_step = on_step
    verifier = Verifier(CountingVerify(f"normal form {key}"), {"rank": 8}, key)
    return FetchJob(store, SettledSource(root), context, verifier).run(REF, None)


def killer(last: int) -> Callable[[str], None]:
    """Return a hook that ends the process at its step of this number."""
    numbers = itertools.count()

    def kill_at(_step: str) -> None:
        if next(numbers) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill_at


def check_swept(store: AdapterStore) -> None:
    """Nothing is left beside whole entries, and these are counted to the byte."""
    store.sweep()
    store.check()
    assert tree(store.root / "trash") == tree(store.root / "locks") == set()
    entries = [size_of(entry.folder) for entry in store.entries()]
    listings = sum((e.folder / "entry.json").stat().st_size for e in store.entries())
    staged = size_of(store.root / "staging")
    assert store.used_bytes() == sum(entries) - listings + staged


def test_a_fetch_that_is_killed_at_any_step_leaves_nothing_half_there(
    root: Path, tmp_path: Path
) -> None:
    steps: list[str] = []
    expected = fetch_with_hook(root, tmp_path / "whole", steps.append).digest
    assert {f"bytes of {WEIGHTS}", f"whole {WEIGHTS}", "write entry", "count entry",
            "publish entry", "record verdict", "record name"} <= set(steps)  # fmt: skip
    for last in range(len(steps)):
        store_dir = tmp_path / f"store-{last}"
        ended = in_child(lambda d=store_dir, n=last: fetch_with_hook(root, d, killer(n)))
        assert ended == -signal.SIGKILL, steps[last]
        store = AdapterStore(store_dir, max_bytes=1 << 30)
        store.check()
        check_swept(store)
        assert {entry.digest for entry in store.entries()} <= {expected}, steps[last]
        assert fetch_with_hook(root, store_dir, lambda _step: None).digest == expected
        check_swept(store)
        assert tree(store_dir / "staging") == set(), steps[last]


def test_a_replacement_that_is_killed_at_any_step_leaves_old_or_new(
    root: Path, tmp_path: Path
) -> None:
    """Equal content under another version: the path that drops what was staged."""
    steps: list[str] = []
    store_dir = tmp_path / "store"
    expected = fetch_with_hook(root, store_dir, lambda _step: None).digest
    touched = (root / "poet" / WEIGHTS).touch
    touched()
    fetch_with_hook(root, store_dir, steps.append)
    assert "drop equal content" in steps
    for last in range(len(steps)):
        touched()
        ended = in_child(lambda n=last: fetch_with_hook(root, store_dir, killer(n)))
        assert ended == -signal.SIGKILL
        store = AdapterStore(store_dir, max_bytes=1 << 30)
        store.check()
        assert [entry.digest for entry in store.entries()] == [expected]
        assert fetch_with_hook(root, store_dir, lambda _step: None).digest == expected
        check_swept(store)


def test_a_second_verdict_that_is_killed_at_any_step_leaves_the_first(
    root: Path, tmp_path: Path
) -> None:
    """Another verifier judges an entry that is in use: what it derives is whole or not there."""
    steps: list[str] = []
    store_dir = tmp_path / "store"
    expected = fetch_with_hook(root, store_dir, lambda _step: None).digest
    fetch_with_hook(root, store_dir, steps.append, "counted")
    assert {"sync derived", "publish derived", "record verdict"} <= set(steps)
    for last in range(len(steps)):
        key = f"of step {last}"
        ended = in_child(lambda n=last, k=key: fetch_with_hook(root, store_dir, killer(n), k))
        assert ended == -signal.SIGKILL
        store = AdapterStore(store_dir, max_bytes=1 << 30)
        store.check()
        entry = store.entry(expected)
        assert entry is not None
        for derived in (path for path in entry.folder.iterdir() if path.is_dir()):
            assert (derived / "normal").read_bytes() == b"made of it"
        fetch_with_hook(root, store_dir, lambda _step: None, key)
        assert entry.has_derived(f"normal form {key}")
        check_swept(store)


def test_an_eviction_that_is_killed_at_any_step_leaves_whole_entries(
    root: Path, tmp_path: Path
) -> None:
    steps: list[str] = []
    store = AdapterStore(tmp_path / "counted", max_bytes=1 << 30, on_step=steps.append)
    store.remove(run(store, SettledSource(root)).digest)
    removing = steps[steps.index("remove entry") :]
    assert removing == ["remove entry", "discarded"]
    for step in removing:
        other = AdapterStore(tmp_path / step, max_bytes=1 << 30)
        digest = run(other, SettledSource(root)).digest

        def remove(path: Path = other.root, step: str = step, digest: str = digest) -> None:
            hook = killer(removing.index(step))
            AdapterStore(path, max_bytes=1 << 30, on_step=hook).remove(digest)

        assert in_child(remove) == -signal.SIGKILL
        other.check()
        assert len(other.entries()) == (1 if step == "remove entry" else 0)
        check_swept(other)
