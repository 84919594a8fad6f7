"""Where adapters come from: one small interface, and what every source agrees on.

A source answers two questions: which concrete version does this id name now
(``resolve``), and give me its files (``fetch``). Only the files named here are ever
fetched. Sources run in the fetcher's child process, never beside the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from lorax_contract.adapters import Access, AdapterRef, AdapterUnavailableError, Reason, refused
from lorax_shard.adapter_files import (
    CONFIG_FILE,
    LABELS_FILE,
    MLX_WEIGHTS_FILE,
    TEMPLATE_FILES,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    StoredFile,
)

_WEIGHTS_FILES = (WEIGHTS_FILE, MLX_WEIGHTS_FILE)
WANTED_FILES = frozenset(
    (CONFIG_FILE, LABELS_FILE, *_WEIGHTS_FILES, *TOKENIZER_FILES, *TEMPLATE_FILES)
)
_MLX_ARRAYS = "adapters.npz"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """What one fetch may take, checked before and while bytes arrive."""

    max_file_bytes: int = 4 << 30
    max_total_bytes: int = 6 << 30
    # Configuration, tokenizer and template: read whole into memory by whoever parses them.
    max_small_file_bytes: int = 64 << 20
    connect_timeout_s: float = 10.0
    # Longest silence of a source that is sending.
    stall_timeout_s: float = 30.0
    # Tries in a row that bring nothing.
    attempts: int = 4
    backoff_s: float = 0.5

    def of_file(self, name: str) -> int:
        """Return the largest number of bytes that a file of this name may have."""
        return self.max_file_bytes if name in _WEIGHTS_FILES else self.max_small_file_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as its source announces it; what is not announced is None."""

    name: str
    size: int | None = None
    sha256: str | None = None
    # What the source needs to find exactly these bytes again.
    locator: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A concrete version: fetching it twice gives the same bytes."""

    version: str
    files: tuple[RemoteFile, ...]
    access: Access = "public"
    # The token that opened it, if it took one.
    token: str | None = None
    # Whether a later look at the same version may trust that its bytes are still these.
    lasting: bool = True
    # The one spelling of the id, where the source takes several; None: as it was asked for.
    id: str | None = None


def _ignore(_step: str) -> None:
    """Do nothing at a named step."""


@dataclass(slots=True, kw_only=True)
class FetchContext:
    """What a source gets beside the question: limits, a deadline, somebody to tell."""

    limits: FetchLimits
    # On the clock of ``now``.
    deadline: float
    now: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    # Called with the bytes that arrived since the last call.
    on_bytes: Callable[[int], None] = lambda _count: None
    # Called before each change of the disk; tests end the process here.
    on_step: Callable[[str], None] = _ignore

    def check_deadline(self, what: str) -> None:
        """Raise when the time for this fetch is over."""
        if self.now() >= self.deadline:
            raise AdapterUnavailableError(
                Reason.TRANSIENT,
                f"{what} did not arrive in time; its source is slow",
            )


class Source(Protocol):
    """One kind of place that adapters come from."""

    @property
    def realm(self) -> str:
        """Which of these places: the same id means different adapters in different realms."""
        ...

    def resolve(self, ref: AdapterRef, token: str | None, context: FetchContext) -> Resolved:
        """Return the version that ``ref`` names now; raises AdapterUnavailableError."""
        ...

    def fetch(
        self, ref: AdapterRef, resolved: Resolved, folder: Path, context: FetchContext
    ) -> tuple[StoredFile, ...]:
        """Put the version's files into ``folder``, going on with what lies there already."""
        ...


def transient(text: str, retry_after_s: float | None = None) -> AdapterUnavailableError:
    """Return the error for trouble that may pass."""
    return AdapterUnavailableError(Reason.TRANSIENT, text, retry_after_s=retry_after_s)


def too_large(what: str, part: str, size: int | None, limit: int) -> AdapterUnavailableError:
    """Return the error for a part that passes a limit; ``size`` None: at least the limit."""
    has = f"has {size:,} bytes" if size is not None else "does not end"
    return AdapterUnavailableError(
        Reason.TOO_LARGE, f"{what}: {part} {has}; the limit is {limit:,} bytes"
    )


def not_found(ref: AdapterRef, text: str) -> AdapterUnavailableError:
    """Return the error for an id that names nothing."""
    return AdapterUnavailableError(Reason.NOT_FOUND, f"adapter {ref} {text}")


def select_files(ref: AdapterRef, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names to fetch out of all that a source has; refuse what is no adapter."""
    found = set(names)
    if CONFIG_FILE not in found:
        raise refused(f"adapter {ref} has no {CONFIG_FILE}: it is not a PEFT adapter")
    if WEIGHTS_FILE not in found and MLX_WEIGHTS_FILE not in found:
        if pickles := sorted(name for name in found if name.endswith(_PICKLES)):
            raise refused(
                f"adapter {ref} has its weights as {pickles[0]}: pickle files can run code and "
                f"are never loaded. Save it as {WEIGHTS_FILE} (PEFT does by default)"
            )
        if _MLX_ARRAYS in found:
            raise refused(
                f"adapter {ref} has its weights as {_MLX_ARRAYS}, which early releases of mlx-lm "
                f"wrote; load it with mlx and save it as {MLX_WEIGHTS_FILE}"
            )
        raise refused(f"adapter {ref} has no {WEIGHTS_FILE}")
    if WEIGHTS_FILE in found:
        found.discard(MLX_WEIGHTS_FILE)
    return tuple(sorted(found & WANTED_FILES))


def check_announced(ref: AdapterRef, files: Iterable[RemoteFile], limits: FetchLimits) -> int:
    """Return the announced bytes; raise when they pass a limit before anything is fetched."""
    total = 0
    for file in files:
        size = file.size or 0
        if size > limits.of_file(file.name):
            raise too_large(f"adapter {ref}", file.name, size, limits.of_file(file.name))
        total += size
    if total > limits.max_total_bytes:
        raise too_large(f"adapter {ref}", "it", total, limits.max_total_bytes)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """Which sources exist and what they may reach. Holds no secret but ``server_token``."""

    # Folders below which ``local`` adapters may lie; none: the source is off.
    local_roots: tuple[str, ...] = ()
    # None: the hub library's own (HF_ENDPOINT).
    hub_endpoint: str | None = None
    hub_enabled: bool = True
    offline: bool = False
    # Like s3://bucket/prefix; "s3://" allows every bucket; none: the source is off.
    s3_roots: tuple[str, ...] = ()
    s3_endpoint: str | None = None
    # Opens private repositories for every caller; None: callers bring their own.
    server_token: str | None = None

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what ``dataclasses.asdict`` and JSON made of it."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in document.items()
        }
        return cls(**values)

    def __repr__(self) -> str:
        return f"SourceSettings(local_roots={self.local_roots}, s3_roots={self.s3_roots})"
