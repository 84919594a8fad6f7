"""A stored adapter on its way from one store into another, by digests and in pieces."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers.small_adapters import make_base, write
from tests.helpers.stored_adapters import put_adapter

from lorax_contract.adapters import AdapterPart, AdapterUnavailableError, FetchedAdapter, Reason
from lorax_shard.adapters.copies import pieces
from lorax_shard.adapters.copies.copier import EntryCopier
from lorax_shard.adapters.copies.pieces import EntryFile, StoredPieces
from lorax_shard.peft.normal import read_normal
from lorax_shard.store.store import AdapterStore

PIECE = 700


class NotedPieces:
    """Rank 0's store, which others may change on its way; counts what is read of it."""

    def __init__(self, store: AdapterStore) -> None:
        self._stored = StoredPieces(store)
        self.num_pieces = 0
        self.on_files: Callable[[list[EntryFile]], list[EntryFile]] = lambda files: files
        self.on_piece: Callable[[int, bytes], bytes] = lambda number, content: content

    def files(self, part: AdapterPart) -> list[EntryFile]:
        return self.on_files(self._stored.files(part))

    def piece(self, part: AdapterPart, file: int, offset: int) -> bytes:
        self.num_pieces += 1
        return self.on_piece(self.num_pieces, self._stored.piece(part, file, offset))


@dataclasses.dataclass
class Copies:
    """Two stores; the first one has an adapter."""

    there: AdapterStore
    here: AdapterStore
    source: NotedPieces
    wanted: FetchedAdapter

    @property
    def part(self) -> AdapterPart:
        return self.wanted.part

    def copier(self, **options: object) -> EntryCopier:
        return EntryCopier(self.here, self.source, **{"deadline_s": 60.0, **options})

    def fails(self, **options: object) -> AdapterUnavailableError:
        """Return why a copy fails; nothing is left of it."""
        with pytest.raises(AdapterUnavailableError) as raised:
            self.copier(**options).copy(self.wanted)
        assert self.here.entries() == []
        assert list((self.here.root / "staging").iterdir()) == []
        assert self.here.used_bytes() == 0
        return raised.value


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Copies:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE)
    there, here = (AdapterStore(tmp_path / name, max_bytes=1 << 24) for name in ("0", "1"))
    part = put_adapter(there, write(tmp_path / "adapter"), make_base())
    entry = there.entry(part.store_digest)
    assert entry is not None
    wanted = FetchedAdapter(
        version="v", part=part, disk_bytes=entry.size, device_bytes=1, max_rank=2
    )
    return Copies(there, here, NotedPieces(there), wanted)


def test_a_copy_is_what_was_verified_there(copies: Copies) -> None:
    with copies.copier().copy(copies.wanted) as entry:
        first = copies.there.entry(copies.part.store_digest)
        assert first is not None
        assert entry.files == first.files
        name = copies.part.content_digest
        assert read_normal(entry.folder / name).digest == read_normal(first.folder / name).digest
    copies.here.check()
    assert copies.source.num_pieces > len(first.files)


def test_what_is_here_is_not_read_again(copies: Copies) -> None:
    copies.copier().copy(copies.wanted).release()
    num = copies.source.num_pieces
    copies.copier().copy(copies.wanted).release()
    held = copies.copier().held(copies.part)
    assert held is not None
    held.release()
    assert copies.source.num_pieces == num


def test_files_without_their_normal_form_get_it(copies: Copies) -> None:
    copies.copier().copy(copies.wanted).release()
    entry = copies.here.entry(copies.part.store_digest)
    assert entry is not None
    shutil.rmtree(entry.folder / copies.part.content_digest)
    assert copies.copier().held(copies.part) is None
    copies.copier().copy(copies.wanted).release()
    assert entry.has_derived(copies.part.content_digest)
    copies.here.check()


def test_what_changed_on_its_way_is_not_kept(copies: Copies) -> None:
    copies.source.on_piece = lambda number, content: bytes(len(content))
    error = copies.fails()
    assert error.reason is Reason.CORRUPT
    assert "is not what rank 0 lists" in error.text


@pytest.mark.parametrize("more", [b"", b"x" * 5000])
def test_a_file_is_as_long_as_it_was_announced(copies: Copies, more: bytes) -> None:
    copies.source.on_piece = lambda number, content: more and content + more
    assert "another" in copies.fails().text


@pytest.mark.parametrize(
    ("name", "is_derived"),
    [
        *((name, is_own) for name in ("../x", "/etc/x", ".deriving") for is_own in (True, False)),
        ("entry.json", False),
    ],
)
def test_names_that_are_none_of_an_adapter_are_refused(
    copies: Copies, name: str, is_derived: bool
) -> None:
    def renamed(files: list[EntryFile]) -> list[EntryFile]:
        number = next(i for i, each in enumerate(files) if each.is_derived is is_derived)
        return [
            dataclasses.replace(each, name=name) if i == number else each
            for i, each in enumerate(files)
        ]

    copies.source.on_files = renamed
    assert "lists other files" in copies.fails().text
    assert copies.source.num_pieces == 0


def test_another_adapter_than_the_one_that_is_wanted_is_refused(copies: Copies) -> None:
    copies.source.on_files = lambda files: [
        dataclasses.replace(each, sha256="0" * 64) if not each.is_derived else each
        for each in files
    ]
    assert "lists other files" in copies.fails().text


def test_more_bytes_than_rank_0_told_the_router_are_refused(copies: Copies) -> None:
    copies.wanted = dataclasses.replace(copies.wanted, disk_bytes=copies.wanted.disk_bytes - 1)
    assert "cannot have" in copies.fails().text
    assert copies.source.num_pieces == 0


def test_a_normal_form_of_something_else_is_refused(copies: Copies) -> None:
    """Though it is what rank 0 lists."""
    folder = copies.there.root / "entries" / copies.part.store_digest / copies.part.content_digest
    other = folder.with_name("0" * 64)
    folder.rename(other)
    part = dataclasses.replace(copies.part, content_digest=other.name)
    copies.wanted = dataclasses.replace(copies.wanted, part=part)
    assert "another adapter's normal form" in copies.fails().text


def test_what_left_the_other_store_is_said(copies: Copies) -> None:
    def evict(number: int, content: bytes) -> bytes:
        assert copies.there.remove(copies.part.store_digest)
        return content

    copies.source.on_piece = evict
    assert copies.fails().reason is Reason.EVICTED


def test_a_copy_ends_in_time(copies: Copies) -> None:
    ticks = iter(range(1000))
    error = copies.fails(deadline_s=2.0, now=lambda: float(next(ticks)))
    assert error.reason is Reason.TRANSIENT
    assert "in time" in error.text


def test_only_digests_lead_to_files(copies: Copies) -> None:
    stored = StoredPieces(copies.there)
    for part in (
        AdapterPart("..", copies.part.store_digest),
        AdapterPart("", copies.part.store_digest),
        AdapterPart(copies.part.content_digest, "../entries"),
    ):
        with pytest.raises(AdapterUnavailableError, match="left rank 0's disk"):
            stored.files(part)
    with pytest.raises(AdapterUnavailableError, match="none of the number 99"):
        stored.piece(copies.part, 99, 0)
