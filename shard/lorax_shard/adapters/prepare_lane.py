"""The adapters that a rank has prepared, by handle: from host copies, beside its steps.

    files ──read──► host copy ──copy──► prepared ──(a step activates it)──► slot
     store           host cache         here, by handle                 engine

``prepare`` and ``release`` belong to the prepare lane: any thread, beside steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lorax_contract.adapters import AdapterContent, LoadReport, refused
from lorax_contract.errors import LoraxError, ShardError
from lorax_contract.step import AdapterHandle
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.lora.prepared import PreparedAdapter
from lorax_shard.peft.merge import merge
from lorax_shard.peft.normal import cast
from lorax_shard.vocabulary import Vocabulary


class DevicePreparer(Protocol):
    """Brings a host copy to the device."""

    def prepare(self, adapter: HostAdapter) -> PreparedAdapter:
        """Check it against the model, convert and copy it; any thread."""


@dataclass(frozen=True, slots=True)
class ReadyAdapter:
    """An adapter that a step may activate."""

    prepared: PreparedAdapter
    # The tokens of its own tokenizer; None: the base's.
    vocabulary: Vocabulary | None
    # Rows of its embedding and head where it adds tokens; 0: the base's.
    vocab_size: int
    # The tokens that invoke it; empty: it acts on every token.
    invocation_ids: tuple[int, ...] = ()
    # The kind of its classification head; "": none.
    head: str = ""


@dataclass(slots=True)
class _Prepared:
    key: str
    ready: ReadyAdapter | None = None
    # Held while it is made, so that a second call waits for the first one's result.
    lock: threading.Lock = field(default_factory=threading.Lock)
    report: LoadReport = field(default_factory=LoadReport)


class PrepareLane:
    """Owns the prepared adapters of one rank.

    Args:
        host: copies of what lies in the store.
        preparer: the model's.
        dtype, low_rank_dtype: what the model computes in, and what the low-rank parts of
            adapters are handed over in; None: as they are stored.
    """

    def __init__(
        self,
        host: HostCache,
        preparer: DevicePreparer,
        *,
        dtype: torch.dtype,
        low_rank_dtype: torch.dtype | None = torch.float32,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._host = host
        self._preparer = preparer
        self._dtype = dtype
        self._low_rank_dtype = low_rank_dtype
        self._clock = clock
        self._lock = threading.Lock()
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
        copies = [self._host.get(part) for part in content.parts]
        adapter, vocabulary = copies[0].adapter, copies[0].vocabulary
        try:
            if content.merge is not None:
                # Texts of a merge are the base's: its parts may differ in theirs.
                adapter = merge([each.adapter for each in copies], content.merge)
                vocabulary = None
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
        ready = ReadyAdapter(
            prepared, vocabulary, adapter.vocab_size, adapter.invocation_ids, adapter.head
        )
        return ready, report

    def tokens(self, content: AdapterContent) -> tuple[Vocabulary | None, int]:
        """Return the vocabulary that a content brings (None: the base's) and its rows of the head.

        Raises AdapterUnavailableError.
        """
        if content.merge is not None:
            # Texts of a merge are the base's.
            return None, 0
        copy = self._host.get(content.parts[0])
        return copy.vocabulary, copy.adapter.vocab_size

    def release(self, handle: AdapterHandle) -> bool:
        """Let a prepared adapter go; return whether it was here."""
        with self._lock:
            return self._prepared.pop(handle, None) is not None

    def forget_all(self) -> None:
        """Let all prepared adapters go, those that are being made included."""
        with self._lock:
            self._prepared.clear()

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
