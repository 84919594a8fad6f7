"""Adapters in host memory: read once, found by their content, within a budget of bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cachetools import Cache

from lorax_contract.adapters import AdapterPart, AdapterUnavailableError, Reason
from lorax_contract.errors import LoraxError
from lorax_contract.eviction import worth
from lorax_shard.giving_way import in_slices
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.normal import read_normal
from lorax_shard.store.evictions import log_eviction
from lorax_shard.store.store import AdapterStore
from lorax_shard.vocabulary import Vocabulary, read_vocabulary

_PATIENCE_S = 600.0


@dataclass(slots=True)
class HostCopy:
    """An adapter as it is stored, in memory of its own."""

    adapter: HostAdapter
    # Of its own tokenizer; None: the base's.
    vocabulary: Vocabulary | None
    read_s: float
    num_uses: int = 0
    worth: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors and its tokens."""
        return self.adapter.nbytes + (0 if self.vocabulary is None else self.vocabulary.nbytes)


class _ByWorth(Cache[str, HostCopy]):
    """Lets go what is worth least, as the store and the device do."""

    def __init__(self, maxsize: int) -> None:
        super().__init__(maxsize, getsizeof=lambda copy: copy.nbytes)
        self._floor = 0.0

    def assess(self, copy: HostCopy) -> None:
        """Note one more use."""
        copy.num_uses += 1
        copy.worth = worth(self._floor, copy.num_uses, copy.read_s, copy.nbytes)

    def popitem(self) -> tuple[str, HostCopy]:
        """Let the next one go; of equals the one that has been unused for longest."""
        digest = min(self, key=lambda each: self[each].worth)
        copy = self.pop(digest)
        self._floor = max(self._floor, copy.worth)
        log_eviction("host", digest, copy.nbytes)
        return digest, copy


class HostCache:
    """The host copies of one rank; safe to use from any thread.

    Args:
        store: the files, shared by all processes of this host.
        host_bytes: what all copies take at most. A larger one is read and not kept.
        patience_s: how long the reading of one may take at most, where steps need the processors.
    """

    def __init__(
        self,
        store: AdapterStore,
        *,
        host_bytes: int,
        patience_s: float = _PATIENCE_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store = store
        self._patience_s = patience_s
        self._clock = clock
        self._lock = threading.Lock()
        self._copies = _ByWorth(host_bytes)
        self._reading: dict[str, threading.Lock] = {}

    def get(self, part: AdapterPart) -> HostCopy:
        """Return the copy, read from the store if it is not here.

        Raises AdapterUnavailableError: EVICTED when files are gone, CORRUPT when they changed.
        """
        digest = part.content_digest
        with self._lock:
            reading = self._reading.setdefault(digest, threading.Lock())
        try:
            # One reads, the others wait for it.
            with reading:
                with self._lock:
                    copy = self._copies.get(digest)
                if copy is None:
                    copy = self._read(part)
                with self._lock:
                    self._copies.assess(copy)
                    # The one used last comes last.
                    self._copies.pop(digest, None)
                    if copy.nbytes <= self._copies.maxsize:
                        self._copies[digest] = copy
                return copy
        finally:
            with self._lock:
                self._reading.pop(digest, None)

    def drop(self, digests: Iterable[str]) -> None:
        """Let copies go; those that are not here are no error."""
        with self._lock:
            for digest in digests:
                self._copies.pop(digest, None)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each copy."""
        with self._lock:
            return {digest: copy.nbytes for digest, copy in self._copies.items()}

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
                folder = entry.folder / part.content_digest
                with in_slices(entry.size, self._patience_s):
                    adapter, vocabulary = read_normal(folder), read_vocabulary(folder)
            except LoraxError as error:
                raise AdapterUnavailableError(
                    Reason.CORRUPT,
                    f"the adapter's files on this host are not what was verified: {error.public}",
                ) from error
        return HostCopy(adapter, vocabulary, self._clock() - started)
