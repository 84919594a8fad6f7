"""Files of the model cache: digests, atomic folders, and safetensors that are whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.files import check_writable, locked, read_json, write_json

MARKER = "complete.json"
_CHUNK_BYTES = 1 << 22
# Larger files are checked by size only when a folder is reused; their digest is in the marker.
_REHASH_LIMIT_BYTES = 8 << 20
# The format's own limit on its header; a larger number means that the file is something else.
_MAX_HEADER_BYTES = 100_000_000
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE_ERRNOS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far a long task has come; ``total`` is None while it is not known."""

    task: str
    done: int
    total: int | None
    unit: str


Progress = Callable[[ProgressEvent], None]


def check_safetensors(path: Path) -> None:
    """Raise StartupError (MODEL_CORRUPT) unless the file is as long as its header says.

    Reads the header only, so a file that was cut short is found without reading its weights.
    """
    size = path.stat().st_size
    header_bytes, header = _read_header(path, size)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + header_bytes + max(ends, default=0)
    if size != expected:
        raise _corrupt(path, f"it holds {size} bytes where its header names {expected}")


def _read_header(path: Path, size: int) -> tuple[int, dict[str, Any]]:
    if size < 8:
        raise _corrupt(path, f"it holds {size} bytes, not even a header")
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise _corrupt(path, "its header does not fit into the file")
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
        for name, entry in header.items():
            if name != "__metadata__":
                _, _ = entry["dtype"], int(entry["data_offsets"][1])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise _corrupt(path, "its header is not a safetensors header") from error
    return header_bytes, header


def _corrupt(path: Path, why: str) -> StartupError:
    return StartupError(
        f"{path} is cut short or damaged: {why}. Delete the file and fetch it again.",
        ExitCode.MODEL_CORRUPT,
    )


def file_digest(path: Path, progress: Progress | None = None) -> str:
    """Return the file's sha256 as hex digits."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(ProgressEvent(f"checksum {path.name}", done, total, "B"))
    return digest.hexdigest()


def remembered_digest(path: Path, cache_dir: Path, progress: Progress) -> str:
    """Return ``file_digest``, remembered in the cache while size, inode and times stay."""
    stat = path.stat()
    identity = [str(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    name = hashlib.sha256(str(path).encode()).hexdigest()[:24]
    memo = cache_dir / "digests" / f"{name}.json"
    known = read_json(memo)
    if known and known.get("identity") == identity:
        return str(known["sha256"])
    digest = file_digest(path, progress)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_json(memo, {"identity": identity, "sha256": digest})
    return digest


def is_complete(folder: Path) -> bool:
    """Tell whether ``publish_folder`` made this folder and its files still are what it made.

    Sizes are compared for every file and digests for small ones: a fraction of a second.
    """
    marker = read_json(folder / MARKER)
    if not marker or not isinstance(marker.get("files"), dict):
        return False
    for name, facts in marker["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["size"]:
            return False
        if facts["size"] <= _REHASH_LIMIT_BYTES and file_digest(path) != facts["sha256"]:
            return False
    return True


def publish_folder(
    folder: Path,
    build: Callable[[Path], None],
    facts: dict[str, Any],
    on_wait: Callable[[], None],
    *,
    resumes: bool = False,
) -> Path:
    """Return ``folder``, built by ``build(temporary folder)`` unless it is complete already.

    One process builds at a time (a file lock); the others call ``on_wait`` and wait. The folder
    appears by one rename with its marker inside, so a killed build leaves nothing half done. One
    that ``resumes`` gets what an earlier build left, and what it leaves is kept.
    """
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), on_wait):
        if is_complete(folder):
            return folder
        # The lock is ours: whatever lies here was left by a process that died.
        for leftover in folder.parent.glob(f".{folder.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = folder.with_name(
            f".{folder.name}.{'part' if resumes else f'tmp-{os.getpid()}'}"
        )
        temporary.mkdir(exist_ok=resumes)
        try:
            build(temporary)
            _mark_complete(temporary, facts)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            if not resumes:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and in those in it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _mark_complete(folder: Path, facts: dict[str, Any]) -> None:
    # Writers of temporary files leave modes for the owner only; the cache may be shared.
    mode, paths = folder.stat().st_mode & 0o666, files_below(folder)
    for path in paths:
        path.chmod(mode)
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size, "sha256": file_digest(path),
        }
        for path in paths
    }  # fmt: skip
    write_json(folder / MARKER, {**facts, "files": files})


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise StartupError (DISK_FULL) if ``folder``'s file system has less than ``needed`` bytes.

    One that cannot be written raises OSError: such file systems have no free byte either.
    """
    check_writable(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise disk_full(folder, f"{what} takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")


def disk_full(folder: Path, detail: str) -> StartupError:
    """Return the error for a file system that has no room left."""
    return StartupError(
        f"the disk that holds {folder} is full: {detail}. Free space there, or set LORAX_CACHE "
        "(and HF_HUB_CACHE for models from the hub) to a folder with more room.",
        ExitCode.DISK_FULL,
    )


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of a full or unwritable disk into StartupErrors that name ``folder``."""
    try:
        yield
    except StartupError:
        raise
    except Exception as error:
        if _says_disk_full(error):
            raise disk_full(folder, "a write failed") from error
        if isinstance(error, OSError) and error.errno in _UNUSABLE_ERRNOS:
            raise StartupError(
                f"{error.filename or folder} cannot be used: {os.strerror(error.errno).lower()}. "
                "Give this user access to it, or set LORAX_CACHE to a folder that it may write.",
                ExitCode.FOLDER_UNUSABLE,
            ) from error
        raise


def _says_disk_full(error: BaseException | None) -> bool:
    # safetensors reports the operating system's error as text of an exception of its own, and
    # download libraries wrap it: hence the text and the chain of causes.
    seen = 0
    while error is not None and seen < 8:
        if isinstance(error, OSError) and error.errno in _DISK_FULL_ERRNOS:
            return True
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
