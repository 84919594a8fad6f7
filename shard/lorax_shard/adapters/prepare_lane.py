"""Adapters of one rank between its disk and its steps: host copies, and what is prepared.

    files ──parse──► host copy ──copy──► prepared ──(a step activates it)──► slot
     store            by digest          by handle                       engine

``prepare`` and ``release`` belong to the prepare lane: any thread, beside steps. Host
copies are kept within a budget; which one goes weighs what reading it again would cost,
how often it was asked for, and its size, as the store on disk does.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorax_contract.adapters import (
    AdapterContent,
    AdapterPart,
    AdapterUnavailableError,
    LoadReport,
    Reason,
    refused,
)
from lorax_contract.errors import LoraxError, ShardError
from lorax_contract.step import AdapterHandle
from lorax_shard.adapters.host_memory import give_back
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.lora.prepared import PreparedAdapter
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.merge import merge
from lorax_shard.peft.normal import cast
from lorax_shard.peft.read import examine
from lorax_shard.store.store import AdapterStore

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_FILE = "tokenizer.json"


class DevicePreparer(Protocol):
    """Brings a host copy to the device."""

    def prepare(self, adapter: HostAdapter) -> PreparedAdapter:
        """Check it against the model, convert and copy it; any thread."""


@dataclass(slots=True)
class HostCopy:
    """A parsed adapter, with the values that are stored."""

    adapter: HostAdapter
    tokenizer: Tokenizer | None
    eos_token_ids: frozenset[int]
    parse_s: float
    num_uses: int = 0
    worth: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors; those of a tokenizer are not counted."""
        return self.adapter.nbytes


@dataclass(frozen=True, slots=True)
class ReadyAdapter:
    """An adapter that a step may activate."""

    prepared: PreparedAdapter
    # The adapter's own; None: the base's.
    tokenizer: Tokenizer | None
    # Rows of its vocabulary where it adds tokens; 0: the base's.
    vocab_size: int
    # What ends its texts beside what ends the base's.
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Prepared:
    key: str
    ready: ReadyAdapter | None = None
    # Held while it is made, so that a second call waits for the first one's result.
    lock: threading.Lock = field(default_factory=threading.Lock)
    report: LoadReport = field(default_factory=LoadReport)


class PrepareLane:
    """Owns the host copies and the prepared adapters of one rank.

    Args:
        store: the files, shared by all processes of this host.
        base: the base model, to read files against.
        limits: what an adapter may be at most.
        preparer: the model's.
        host_bytes: budget of the host copies; one in use may pass it.
        dtype, low_rank_dtype: what the model computes in, and its low-rank parts.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: BaseDescription,
        limits: AdapterLimits,
        preparer: DevicePreparer,
        *,
        host_bytes: int,
        dtype: torch.dtype,
        low_rank_dtype: torch.dtype = torch.float32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store = store
        self._base = base
        self._limits = limits
        self._preparer = preparer
        self._host_bytes = host_bytes
        self._dtype = dtype
        self._low_rank_dtype = low_rank_dtype
        self._clock = clock
        self._lock = threading.Lock()
        self._host: dict[str, HostCopy] = {}
        self._reading: dict[str, threading.Lock] = {}
        self._worth_floor = 0.0
        self._prepared: dict[AdapterHandle, _Prepared] = {}

    # --- prepare lane -------------------------------------------------------------

    def prepare(self, handle: AdapterHandle, content: AdapterContent) -> LoadReport:
        """Make a content ready under its handle; a repeated call changes nothing.

        Raises AdapterUnavailableError: EVICTED when files are gone, REFUSED in words.
        """
        while True:
            with self._lock:
                entry = self._prepared.setdefault(handle, _Prepared(content.key))
            if entry.key != content.key:
                raise ShardError(f"adapter handle {handle} named another content; use a new handle")
            with entry.lock:
                if entry.ready is None:
                    if not self._holds(handle, entry):
                        # The call that this one waited for failed: what it made is not here.
                        continue
                    try:
                        entry.ready, entry.report = self._made(content)
                    except BaseException:
                        self._withdraw(handle, entry)
                        raise
            return entry.report

    def _holds(self, handle: AdapterHandle, entry: _Prepared) -> bool:
        with self._lock:
            return self._prepared.get(handle) is entry

    def _withdraw(self, handle: AdapterHandle, entry: _Prepared) -> None:
        with self._lock:
            # Another one may be there: this handle may have been released meanwhile.
            if self._prepared.get(handle) is entry:
                del self._prepared[handle]

    def _made(self, content: AdapterContent) -> tuple[ReadyAdapter, LoadReport]:
        started = self._clock()
        copies = [self.host_copy(part) for part in content.parts]
        first = copies[0]
        adapter, tokenizer, eos_token_ids = first.adapter, first.tokenizer, first.eos_token_ids
        try:
            if content.merge is not None:
                # Texts of a merge are the base's: its parts may differ in theirs.
                adapter = merge([each.adapter for each in copies], content.merge)
                tokenizer, eos_token_ids = None, frozenset()
            parsed = self._clock()
            adapter = cast(adapter, dtype=self._dtype, low_rank_dtype=self._low_rank_dtype)
            prepared = self._preparer.prepare(adapter)
        except LoraxError as error:
            raise refused(f"the adapter cannot be loaded: {error.public}") from error
        report = LoadReport(
            device_bytes=prepared.nbytes,
            parse_s=parsed - started,
            copy_s=self._clock() - parsed,
        )
        return ReadyAdapter(prepared, tokenizer, adapter.vocab_size, eos_token_ids), report

    def release(self, handle: AdapterHandle, forget: Sequence[AdapterPart] = ()) -> None:
        """Let a prepared adapter go; of the parts to forget the host copies and files go too."""
        with self._lock:
            self._prepared.pop(handle, None)
            for part in forget:
                self._host.pop(part.content_digest, None)
        for part in forget:
            if not self._store.remove(part.store_digest):
                logger.info("adapter files %s stay: another process reads them", part.store_digest)
        if forget:
            give_back()

    def host_copy(self, part: AdapterPart) -> HostCopy:
        """Return the parsed adapter, read from its files if there is no copy."""
        with self._lock:
            reading = self._reading.setdefault(part.content_digest, threading.Lock())
        try:
            # One reads, the others wait for it.
            with reading:
                with self._lock:
                    copy = self._host.get(part.content_digest)
                if copy is None:
                    copy = self._read(part)
                with self._lock:
                    # The one used last comes last.
                    self._host.pop(part.content_digest, None)
                    self._host[part.content_digest] = copy
                    copy.num_uses += 1
                    self._assess(copy)
                    self._evict(keep=part.content_digest)
                return copy
        finally:
            with self._lock:
                self._reading.pop(part.content_digest, None)

    def _read(self, part: AdapterPart) -> HostCopy:
        started = self._clock()
        lease = self._store.lease(part.store_digest)
        if lease is None:
            raise AdapterUnavailableError(
                Reason.EVICTED, "the adapter's files left the disk; it must be fetched again"
            )
        with lease as entry:
            self._store.count_use(entry.digest)
            try:
                examined = examine(entry.folder, self._base, self._limits)
            except LoraxError as error:
                raise refused(f"the adapter is not served: {error.public}") from error
            adapter = examined.adapter
            if adapter.digest != part.content_digest:
                raise AdapterUnavailableError(
                    Reason.CORRUPT, "the adapter's files on this host are not what was verified"
                )
            tokenizer = _tokenizer(entry.folder)
            ends = frozenset() if tokenizer is None else _eos_token_ids(entry.folder, tokenizer)
        return HostCopy(_in_memory(adapter), tokenizer, ends, self._clock() - started)

    # --- host budget ----------------------------------------------------------------

    def _assess(self, copy: HostCopy) -> None:
        copy.worth = self._worth_floor + copy.num_uses * copy.parse_s / max(copy.nbytes, 1)

    def _evict(self, *, keep: str) -> None:
        total = sum(copy.nbytes for copy in self._host.values())
        while total > self._host_bytes and len(self._host) > 1:
            # Of equals the one that has been unused for longest goes.
            digest = min(
                (digest for digest in self._host if digest != keep),
                key=lambda digest: self._host[digest].worth,
            )
            copy = self._host.pop(digest)
            self._worth_floor = max(self._worth_floor, copy.worth)
            total -= copy.nbytes

    # --- facts ------------------------------------------------------------------------

    def ready(self, handle: AdapterHandle) -> ReadyAdapter | None:
        """Return a prepared adapter; None if there is none under this handle."""
        with self._lock:
            entry = self._prepared.get(handle)
        return None if entry is None else entry.ready

    def device_tier(self) -> dict[AdapterHandle, tuple[str, int]]:
        """Return the content and the bytes of each prepared adapter."""
        with self._lock:
            entries = list(self._prepared.items())
        return {
            handle: (entry.key, entry.report.device_bytes)
            for handle, entry in entries
            if entry.ready is not None
        }

    def host_tier(self) -> dict[str, int]:
        """Return the bytes of each host copy."""
        with self._lock:
            return {digest: copy.nbytes for digest, copy in self._host.items()}


def _in_memory(adapter: HostAdapter) -> HostAdapter:
    """Return the adapter with tensors of its own: a mapped file would keep its disk space."""
    done: dict[int, torch.Tensor] = {}

    def own(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # Shared tensors stay shared.
        if id(value) not in done:
            done[id(value)] = value.clone()
        return done[id(value)]

    def copied(delta: Any) -> Any:
        names = (each.name for each in dataclasses.fields(delta))
        return dataclasses.replace(delta, **{name: own(getattr(delta, name)) for name in names})

    modules = {name: copied(delta) for name, delta in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules)


def _tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / _TOKENIZER_FILE
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for all that can go wrong
        raise refused(f"the adapter's {_TOKENIZER_FILE} cannot be read: {error}") from error


def _eos_token_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the id of the token that the adapter's tokenizer calls the end of a text."""
    try:
        document = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return frozenset()
    token = document.get("eos_token") if isinstance(document, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
    return frozenset() if number is None else frozenset({number})
