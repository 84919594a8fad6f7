"""An elementwise backend for tests: it fuses whatever can be, in plain operations on a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from lorax_shard.attention.kv_cache import NO_SLOT
from lorax_shard.fused.backend import KVSlots, PendingRotation, RotatingStore, WeightedNorm
from lorax_shard.fused.reference import TorchElementwise
from lorax_shard.fused.registry import BACKENDS

NAME = "together"


class FusedTogether(TorchElementwise, RotatingStore):
    """Counts its calls, those from outside."""

    name = NAME
    adds_with_norms = True
    calls: Counter[str] = Counter()

    def rms_norm(self, *given: Any) -> torch.Tensor:
        self.calls["rms_norm"] += 1
        return super().rms_norm(*given)

    def add_norms(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        inner: WeightedNorm | None,
        outer: WeightedNorm | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls["add_norms"] += 1
        return TorchElementwise().add_norms(x, delta, inner, outer)

    def rotate(self, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls["rotate"] += 1
        return super().rotate(*given)

    def rotate_and_store(
        self, pending: PendingRotation, value: torch.Tensor, kept: KVSlots
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls["rotate_and_store"] += 1
        query, key = super().rotate(*pending)
        is_kept = kept.slots != NO_SLOT
        for pool, new in ((kept.keys, key), (kept.values, value)):
            by_token = new[0].transpose(0, 1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            pool.flatten(0, 1)[kept.slots[is_kept]] = by_token[is_kept].to(pool.dtype)
        return query, key


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> type[FusedTogether]:
    """Make the backend known by its name."""
    monkeypatch.setitem(BACKENDS.classes, NAME, f"{__name__}:FusedTogether")
    monkeypatch.setattr(FusedTogether, "calls", Counter())
    return FusedTogether
