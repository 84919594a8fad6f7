"""Layers of linears, and adapters for all of them: many small matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorax_shard.lora.delta import HostAdapter, ModuleDelta

NUM_LAYERS = 6


class Block(nn.Module):
    """The linears of a layer."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16), ("o_proj", 32)):
            setattr(self, name, nn.Linear(32, out, bias=name == "o_proj"))


class Layers(nn.Module):
    """Enough layers that a copy for each would show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(NUM_LAYERS)])
        self.requires_grad_(False)


def layered_adapter(
    sites: dict[str, Any], rank: int = 3, dtype: torch.dtype = torch.float32
) -> HostAdapter:
    """Low-rank parts everywhere, DoRA and a whole bias here and there."""
    generator = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    modules = {
        name: ModuleDelta(
            a=draw(rank, site.in_features), b=draw(site.out_features, rank), scaling=0.5,
            magnitude=draw(site.out_features).abs() if name.endswith("2.q_proj") else None,
            bias=draw(site.out_features) if name.endswith("o_proj") else None,
        )
        for name, site in sites.items()
    }  # fmt: skip
    return HostAdapter(digest=f"rank-{rank}", modules=modules)
