"""Fetches under way, and those that broke off: one folder and one reservation for each."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorax_shard import files
from lorax_shard.store.index import StoreIndex

_DERIVING_FOLDER = ".deriving"
# A broken-off fetch that nobody took up again for this long is dropped.
_LIFE_S = 86_400.0
# So many broken-off fetches are kept at most, those that began last.
_MAX_BROKEN_OFF = 16
# Below this a broken-off fetch is no loss.
_LEAST_KEPT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Staging:
    """A folder in which one version is put together by whoever holds its lock."""

    version: str
    folder: Path

    @contextlib.contextmanager
    def deriving(self) -> Iterator[Path]:
        """Give an empty folder for what is made of an adapter's files; it goes if not named."""
        folder = self.folder / _DERIVING_FOLDER
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def name_derived(self, name: str) -> None:
        """Give what was made its name; it is published with the adapter's files."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / _DERIVING_FOLDER).rename(self.folder / name)

    def clear_files(self) -> None:
        """Remove the files that were fetched."""
        for path in _files_in(self.folder):
            path.unlink()

    def clear_folders(self) -> None:
        """Remove what was derived from them."""
        self.clear(keep=[path.name for path in _files_in(self.folder)])

    def clear(self, keep: Collection[str | None] = ()) -> None:
        """Remove what lies in the folder but what has one of these names."""
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class StagingArea:
    """The folders in which versions are put together, bounded in number.

    Who works in one holds the lock of its version.
    """

    def __init__(
        self,
        root: Path,
        index: StoreIndex,
        clock: Callable[[], float],
        on_step: Callable[[str], None],
    ) -> None:
        self._root = root
        self._index = index
        self._clock = clock
        self._on_step = on_step

    @contextlib.contextmanager
    def fetching(self, version: str) -> Iterator[Staging]:
        """Hold a version's lock, so that it is fetched once, and give its staging folder."""
        with files.locked(self._lock(version)):
            staging = Staging(version, self._folder(version))
            for other in self.others(version)[:-_MAX_BROKEN_OFF]:
                self.drop(other)
            self._index.set_reserved(version, files.size_of(staging.folder), self._clock())
            self._on_step("make staging")
            staging.folder.mkdir(exist_ok=True)
            # A transfer is taken up where it broke off; what was derived is made anew.
            staging.clear_folders()
            try:
                yield staging
            finally:
                self._put_away(staging, self._clock())

    def others(self, version: str) -> list[str]:
        """Return the other versions that are fetched or broke off, the oldest first."""
        return [each for each in self._index.reserved() if each != version]

    def drop(self, version: str) -> None:
        """Remove a staged folder unless somebody fetches into it."""
        with self._idle(version) as staging:
            if staging is not None:
                self._discard(staging)

    def sweep(self) -> None:
        """Drop what is old, and reserve for what was killed what it left."""
        known = self._index.reserved()
        there = {path.name for path in (self._root / "staging").iterdir()}
        for version in {*known, *there}:
            age_s = self._clock() - known.get(version, 0.0)
            with self._idle(version) as staging:
                if staging is not None and age_s >= _LIFE_S:
                    self._discard(staging)
                elif staging is not None:
                    # One that was killed holds what was announced, not what came.
                    self._put_away(staging, known[version])

    def _put_away(self, staging: Staging, since_s: float) -> None:
        """Keep what a fetch left if it is worth taking up."""
        largest = max((path.stat().st_size for path in _files_in(staging.folder)), default=0)
        if largest >= _LEAST_KEPT_BYTES:
            self._index.set_reserved(staging.version, files.size_of(staging.folder), since_s)
        else:
            self._discard(staging)

    @contextlib.contextmanager
    def _idle(self, version: str) -> Iterator[Staging | None]:
        """Keep others from fetching a version; None: somebody fetches it."""
        lock = files.acquire(self._lock(version), wait=False)
        try:
            yield None if lock is None else Staging(version, self._folder(version))
        finally:
            if lock is not None:
                lock.release()

    def _discard(self, staging: Staging) -> None:
        files.discard(staging.folder, self._root / "trash", self._on_step)
        self._index.release(staging.version)

    def _folder(self, version: str) -> Path:
        return self._root / "staging" / version

    def _lock(self, version: str) -> Path:
        return self._root / "locks" / f"version-{version}"


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
