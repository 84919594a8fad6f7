"""A store with small adapters, host copies of them, and a lane that prepares them for nobody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.small_adapters import QUERY, config, make_base, tensors, write
from tests.helpers.stored_adapters import put_adapter
from tests.helpers.tiny_models import make_tokenizer

from lorax_contract.adapters import AdapterContent, AdapterPart, AdapterUnavailableError
from lorax_contract.step import AdapterHandle
from lorax_shard.adapters.host_cache import HostCache
from lorax_shard.adapters.prepare_lane import PrepareLane
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.store.store import AdapterStore


@dataclass(frozen=True)
class Made:
    """What the preparer here makes of an adapter."""

    digest: str
    nbytes: int


class NotingPreparer:
    """Notes what it is given; ``before`` runs first and may block or raise."""

    def __init__(self) -> None:
        self.made: list[HostAdapter] = []
        self.before: Callable[[HostAdapter], None] = lambda _adapter: None

    def prepare(self, adapter: HostAdapter) -> Any:
        self.before(adapter)
        self.made.append(adapter)
        return Made(adapter.digest, adapter.nbytes)


class Ticks:
    """A clock on which reading any adapter takes as long as the one before, or as told."""

    def __init__(self) -> None:
        self.now, self.step_s = 0.0, 1.0

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


class LaneWorld:
    """A store with adapters, and a lane over it."""

    def __init__(self, folder: Path, host_bytes: int = 1 << 20) -> None:
        self.folder = folder
        self.store = AdapterStore(folder / "store", max_bytes=1 << 30)
        self.preparer, self.clock = NotingPreparer(), Ticks()
        self.host = HostCache(self.store, host_bytes=host_bytes, clock=self.clock)
        self.lane = PrepareLane(self.host, self.preparer, dtype=torch.float32)

    def add(self, scale: float = 1.0, rank: int = 2, tokenizer: bool = False) -> AdapterPart:
        """Put an adapter into the store."""
        values = {name: scale * value for name, value in tensors(QUERY, rank=rank).items()}
        staging = write(self.folder / "staging", config(r=rank), values)
        if tokenizer:
            make_tokenizer(staging)
        return put_adapter(self.store, staging, make_base())

    def prepare(self, handle: AdapterHandle, *parts: AdapterPart) -> Any:
        return self.lane.prepare(handle, AdapterContent(parts=parts))


def failure(call: Callable[[], object]) -> AdapterUnavailableError:
    with pytest.raises(AdapterUnavailableError) as caught:
        call()
    return caught.value
