"""Adapters from folders of this machine: below allowed roots, copied while they are hashed.

A path is resolved first, links and all; what it leads to must lie below a root. The walk
to it then follows no link at all, so nothing that is swapped in meanwhile leads outside.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BufferedReader
from pathlib import Path

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason, key_of, refused
from lorax_shard.adapter_files import StoredFile
from lorax_shard.fetching.sources.interface import (
    FetchContext,
    RemoteFile,
    Resolved,
    SourceSettings,
    not_found,
    select_files,
    transient,
)
from lorax_shard.fetching.sources.stream import Broken, Opened, Opener, download
from lorax_shard.giving_way import PIECE_BYTES

# File times tick: within this time a second write may leave the same time stamp.
_RACY_NS = 2_000_000_000


class LocalSource:
    """Folders below the allowed roots."""

    def __init__(self, settings: SourceSettings) -> None:
        self._roots = tuple(os.path.realpath(root) for root in settings.local_roots)
        # As the operator spells them, for callers who do.
        self._spelled_roots = tuple(os.path.abspath(root) for root in settings.local_roots)

    @property
    def realm(self) -> str:
        """Which of these places it is."""
        return "this machine"

    def resolve(self, ref: AdapterRef, token: str | None, context: FetchContext) -> Resolved:
        """Return a version made of sizes, times and inodes of the folder's files."""
        if ref.revision is not None:
            raise refused(f"adapter {ref}: local folders have no revisions")
        folder = self._find(ref)
        with self._opened_folder(ref, folder) as handle:
            names = select_files(ref, os.listdir(handle))
        files, newest = [], 0
        for name in names:
            with self._opened_file(ref, folder, name) as file:
                facts = os.fstat(file.fileno())
            newest = max(newest, facts.st_mtime_ns, facts.st_ctime_ns)
            files.append(RemoteFile(name=name, size=facts.st_size, locator=_print_of(facts)))
        version = key_of(str(folder), *(f"{file.name} {file.locator}" for file in files))
        settled = time.time_ns() - newest > _RACY_NS
        return Resolved(
            version=version, files=tuple(files), lasting=settled, id=self._one_spelling(ref, folder)
        )

    def fetch(
        self, ref: AdapterRef, resolved: Resolved, folder: Path, context: FetchContext
    ) -> tuple[StoredFile, ...]:
        """Copy and hash the files; fails when one of them changes meanwhile."""
        # A copy has no transfer to save, and kept bytes may be of an older edit.
        for leftover in folder.iterdir():
            if leftover.is_file():
                leftover.unlink()
        source = self._find(ref)
        stored = tuple(
            download(f"adapter {ref}", file, folder, self._opener(ref, source, file), context)
            for file in resolved.files
        )
        for file in resolved.files:
            with self._opened_file(ref, source, file.name) as opened:
                if _print_of(os.fstat(opened.fileno())) != file.locator:
                    raise _changed(ref)
        return stored

    def _find(self, ref: AdapterRef) -> Path:
        """Return the real folder that ``ref`` leads to; it lies below a root."""
        if not self._roots:
            raise AdapterUnavailableError(
                Reason.REFUSED,
                f"adapter {ref}: this server takes no local adapters; its operator allows a "
                "folder with --adapter-local-root",
            )
        if ".." in Path(ref.id).parts:
            raise _outside(ref)
        for root in self._roots:
            real = os.path.realpath(os.path.join(root, ref.id))
            if not _is_below(real, root):
                continue
            if os.path.isdir(real):
                return Path(real)
            if os.path.isfile(real):
                raise not_found(ref, "is a file; name the folder that it lies in")
        if all(
            not _is_below(os.path.realpath(os.path.join(root, ref.id)), root)
            for root in self._roots
        ):
            raise _outside(ref)
        raise not_found(ref, "is no folder below the server's local adapter folders")

    def _one_spelling(self, ref: AdapterRef, folder: Path) -> str:
        """Return the path below a root, which whoever spells the root means too.

        A link keeps its own name: it may lead elsewhere tomorrow.
        """
        plain = ref.plain.id
        if not os.path.isabs(plain):
            return plain
        for root in (*self._roots, *self._spelled_roots):
            if not _is_below(plain, root):
                continue
            below = os.path.relpath(plain, root)
            # Another root may come first and have a folder of that name.
            if self._find(replace(ref, id=below)) == folder:
                return below
        return plain

    def _root_of(self, ref: AdapterRef, path: str) -> str:
        for root in self._roots:
            if _is_below(path, root):
                return root
        raise _outside(ref)

    @contextlib.contextmanager
    def _opened_folder(self, ref: AdapterRef, folder: Path) -> Iterator[int]:
        """Open a real folder step by step from its root, following no link."""
        root = self._root_of(ref, str(folder))
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(root, flags)
        try:
            for part in Path(os.path.relpath(folder, root)).parts:
                inner = os.open(part, flags, dir_fd=handle)
                os.close(handle)
                handle = inner
            yield handle
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _changed(ref) from error
        except PermissionError as error:
            raise _unreadable(ref, folder.name) from error
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _opened_file(self, ref: AdapterRef, folder: Path, name: str) -> Iterator[BufferedReader]:
        """Open a regular file; a link is fine as long as it leads below a root."""
        real = Path(os.path.realpath(folder / name))
        self._root_of(ref, str(real))
        with self._opened_folder(ref, real.parent) as handle:
            try:
                # Before it is opened: a socket cannot be, and a folder is no file then.
                facts = os.stat(real.name, dir_fd=handle, follow_symlinks=False)
                if not stat.S_ISREG(facts.st_mode):
                    raise refused(f"adapter {ref}: {name} is not a regular file")
                # Without O_NONBLOCK the opening of a pipe would wait for a writer.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                descriptor = os.open(real.name, flags, dir_fd=handle)
            except PermissionError as error:
                raise _unreadable(ref, name) from error
            except OSError as error:
                raise _changed(ref) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _changed(ref)
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def _opener(self, ref: AdapterRef, folder: Path, file: RemoteFile) -> Opener:
        @contextlib.contextmanager
        def opener(start: int) -> Iterator[Opened]:
            with self._opened_file(ref, folder, file.name) as opened:
                if _print_of(os.fstat(opened.fileno())) != file.locator:
                    raise _changed(ref)
                opened.seek(start)
                try:
                    yield Opened(start=start, total=file.size, chunks=_pieces(opened))
                except Broken as broken:
                    raise _changed(ref) from broken

        return opener


def _pieces(file: BufferedReader) -> Iterator[memoryview]:
    """Yield what a file has, always in the same memory."""
    memory = memoryview(bytearray(PIECE_BYTES))
    while count := file.readinto(memory):
        yield memory[:count]


def _is_below(path: str, root: str) -> bool:
    """Whether a path leads below a root, or to it: a root may be an adapter's own folder."""
    return os.path.commonpath([path, root]) == root


def _print_of(facts: os.stat_result) -> str:
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_dev} {facts.st_ino}"


def _changed(ref: AdapterRef) -> AdapterUnavailableError:
    return transient(f"adapter {ref}: its folder changed while it was copied; try again")


def _outside(ref: AdapterRef) -> AdapterUnavailableError:
    return refused(f"adapter {ref} leads outside the folders that this server may read")


def _unreadable(ref: AdapterRef, name: str) -> AdapterUnavailableError:
    return AdapterUnavailableError(
        Reason.NO_ACCESS, f"adapter {ref}: the server may not read {name}"
    )
