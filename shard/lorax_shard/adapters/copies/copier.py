"""Brings a stored adapter from rank 0's store into this host's, checked like any fetch."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lorax_contract.adapters import (
    AdapterPart,
    AdapterUnavailableError,
    FetchedAdapter,
    Reason,
    key_of,
)
from lorax_contract.errors import LoraxError
from lorax_shard.adapter_files import StoredFile, files_digest
from lorax_shard.adapters.copies.pieces import EntryFile, EntryReader, held_whole
from lorax_shard.fetching.sources.interface import WANTED_FILES, FetchLimits
from lorax_shard.peft.normal import read_normal
from lorax_shard.store.staging import Staging
from lorax_shard.store.store import AdapterStore, Lease

_MAX_DERIVED_FILES = 16
_NAME = re.compile(r"[a-z]\w{0,40}\.\w{1,16}", re.ASCII)


class EntryCopier:
    """Copies entries of a store. Its calls wait for the other end; any thread may call.

    Args:
        store: where copies go.
        source: what they are read from.
        limits: how much one adapter may have.
        deadline_s: seconds that one copy may take.
    """

    def __init__(
        self,
        store: AdapterStore,
        source: EntryReader,
        *,
        deadline_s: float,
        limits: FetchLimits | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._source = source
        self._limits = limits or FetchLimits()
        self._deadline_s = deadline_s
        self._now = now

    def held(self, part: AdapterPart) -> Lease | None:
        """Keep an adapter that is here from being evicted; None: it is not here."""
        return held_whole(self._store, part)

    def copy(self, wanted: FetchedAdapter) -> Lease:
        """Have an adapter here as it is there, and keep it; one that is here is not read again.

        Raises AdapterUnavailableError: what is not what was announced is not kept.
        """
        part = wanted.part
        with self._store.fetching(key_of("rank 0", part.store_digest)) as staging:
            if (lease := self.held(part)) is None:
                self._bring(wanted, staging)
                lease = self.held(part)
        if lease is None:
            raise AdapterUnavailableError(
                Reason.STORE_FULL, "the adapter was evicted as soon as it was copied from rank 0"
            )
        return lease

    def _bring(self, wanted: FetchedAdapter, staging: Staging) -> None:
        # Of a copy that broke off nobody knows which files are whole.
        staging.clear()
        try:
            self._publish(wanted, staging)
        except BaseException:
            if staging.folder.is_dir():
                staging.clear()
            raise

    def _publish(self, wanted: FetchedAdapter, staging: Staging) -> None:
        part, began = wanted.part, self._now()
        announced = self._source.files(part)
        self._check(announced, wanted)
        self._store.make_room(sum(each.size for each in announced), staging)
        (staging.folder / part.content_digest).mkdir()
        for number, file in enumerate(announced):
            self._write(part, number, file, staging, began + self._deadline_s)
        _check_normal(staging.folder / part.content_digest)
        files = _own(announced)
        entry = self._store.commit(staging, files, self._now() - began, part.content_digest)
        if not entry.has_derived(part.content_digest):
            self._store.add_derived(staging, entry, part.content_digest)

    def _check(self, announced: Sequence[EntryFile], wanted: FetchedAdapter) -> None:
        """Refuse a list of files that is not the wanted adapter's, before any of them comes."""
        own, derived = _own(announced), [each for each in announced if each.is_derived]
        names = {(each.is_derived, each.name) for each in announced}
        is_sound = (
            len(names) == len(announced)
            and len(derived) <= _MAX_DERIVED_FILES
            and all(each.name in WANTED_FILES for each in own)
            and all(_NAME.fullmatch(each.name) for each in derived)
            and wanted.part.content_digest.isalnum()
        )
        if not is_sound or files_digest(own) != wanted.part.store_digest:
            raise _corrupt("rank 0 lists other files than the adapter's")
        size, limit = sum(each.size for each in announced), 2 * self._limits.max_total_bytes
        if sum(each.size for each in own) != wanted.disk_bytes or size > limit:
            raise _corrupt(f"rank 0 lists {size:,} bytes of files, which the adapter cannot have")

    def _write(
        self, part: AdapterPart, number: int, file: EntryFile, staging: Staging, deadline: float
    ) -> None:
        folder = staging.folder / (part.content_digest if file.is_derived else "")
        digest, size = hashlib.sha256(), 0
        with (folder / file.name).open("xb") as opened:
            while size < file.size:
                if self._now() > deadline:
                    raise _transient(f"{file.name} did not come from rank 0 in time")
                piece = self._source.piece(part, number, size)
                size += len(piece)
                if not piece or size > file.size:
                    raise _corrupt(f"rank 0 gives another {file.name} than it lists")
                digest.update(piece)
                opened.write(piece)
        if digest.hexdigest() != file.sha256:
            raise _corrupt(f"{file.name} is not what rank 0 lists")


def _own(announced: Sequence[EntryFile]) -> list[StoredFile]:
    return [
        StoredFile(name=each.name, size=each.size, sha256=each.sha256)
        for each in announced
        if not each.is_derived
    ]


def _check_normal(folder: Path) -> None:
    """Refuse a normal form that does not compute what its name says."""
    try:
        digest = read_normal(folder).digest
    except LoraxError as error:
        raise _corrupt(f"what came from rank 0 cannot be read: {error.public}") from error
    if digest != folder.name:
        raise _corrupt("what came from rank 0 is another adapter's normal form")


def _corrupt(text: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(Reason.CORRUPT, text)


def _transient(text: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(Reason.TRANSIENT, text)
