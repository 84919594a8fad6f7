"""Dummy adapters: as wide as they may be, for measuring what a step with them takes, and samples.

All their matrices are one piece of zeros: a step's buffers depend on shapes alone, and the
adapters' own bytes are budgeted elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lorax_shard.lora.backend import GroupWeights
from lorax_shard.lora.prepared import LinearChange, PreparedAdapter
from lorax_shard.lora.sites import Kind, Site, find_groups

# Ranks of samples at most, and about how large their numbers are.
_SAMPLE_RANK = 16
_SAMPLE_SIZE = 0.02


class MeasurableSlots(Protocol):
    """What is asked of a model's slots."""

    @property
    def sites(self) -> Mapping[str, Any]:
        """The places that adapters can change, as ``Site``."""

    @property
    def slots(self) -> Mapping[int, str]:
        """The loaded slots."""

    def load(self, slot: int, adapter: Any) -> None:
        """Put a prepared adapter into an empty slot."""

    def unload(self, slot: int) -> None:
        """Empty a slot."""


@contextmanager
def loaded_dummies(
    slots: MeasurableSlots, rank: int, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Within, two further slots hold dummies: rows that alternate between them are apart."""
    adapter = dummy_adapter(dict(slots.sites), rank, dtype, device)
    first = max(slots.slots, default=-1) + 1
    loaded: list[int] = []
    try:
        for slot in (first, first + 1):
            slots.load(slot, adapter)
            loaded.append(slot)
        yield
    finally:
        for slot in loaded:
            slots.unload(slot)


@contextmanager
def loaded_samples(slots: MeasurableSlots, rank: int) -> Iterator[list[int]]:
    """Within, two further slots hold low-rank parts of linears before the head, other ones each."""
    loaded: list[int] = []
    try:
        for number, of_slot in enumerate((rank, max(1, rank // 2))):
            slot = next(each for each in range(len(slots.slots) + 1) if each not in slots.slots)
            slots.load(slot, sample_adapter(slots.sites, min(of_slot, _SAMPLE_RANK), number))
            loaded.append(slot)
        yield loaded
    finally:
        for slot in loaded:
            slots.unload(slot)


def sample_adapter(sites: Mapping[str, Site], rank: int, seed: int) -> PreparedAdapter:
    """Return an adapter of random numbers, small enough to leave a model's outputs finite."""
    weight = next(site.weight for site in sites.values() if site.kind is Kind.LINEAR)
    generator = torch.Generator(weight.device).manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=weight.device)
        return (values * _SAMPLE_SIZE).to(weight.dtype)

    groups = enumerate(find_groups(dict(sites)))
    return PreparedAdapter(
        digest=f"sample {seed}",
        groups={
            number: GroupWeights(
                numbers(rank * len(group), group[0].widths[0]),
                tuple(numbers(rank, site.widths[1]) for site in group),
            )
            for number, group in groups
            if not group[0].is_head
        },
        linears={},
        embeddings={},
        vectors={},
        num_logits=0,
        max_rank=rank,
    )


def dummy_adapter(
    sites: dict[str, Site], rank: int, dtype: torch.dtype, device: torch.device
) -> PreparedAdapter:
    """Return an adapter of ``rank`` on linears of every shape, whose outputs it scales as DoRA does.

    One of each is enough: what a module's adapters take is free again when it has computed.
    """
    groups = list(find_groups(sites))
    widths = {name: site.widths for name, site in sites.items() if site.kind is Kind.LINEAR}
    first: dict[Any, int] = {}
    for number, group in enumerate(groups):
        first.setdefault((group[0].is_head, *(widths[site.name] for site in group)), number)
    chosen = {number: groups[number] for number in first.values()}
    names = [site.name for group in chosen.values() for site in group]
    zeros = _Zeros(_most_elements(groups, widths, rank), dtype, device)
    return PreparedAdapter(
        digest="dummy",
        groups={
            number: GroupWeights(
                zeros.view(rank * len(group), widths[group[0].name][0]),
                tuple(zeros.view(rank, widths[site.name][1]) for site in group),
            )
            for number, group in chosen.items()
        },
        linears={name: LinearChange(scale=zeros.view(widths[name][1])) for name in names},
        embeddings={},
        vectors={},
        num_logits=0,
        max_rank=rank,
    )


class _Zeros:
    """Tensors of any shape over the same zeros."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._all = torch.zeros(size, dtype=dtype, device=device)

    def view(self, *shape: int) -> torch.Tensor:
        return self._all[: math.prod(shape)].view(shape)


def _most_elements(
    groups: list[list[Site]], widths: Mapping[str, tuple[int, int]], rank: int
) -> int:
    of_a = (rank * len(group) * widths[group[0].name][0] for group in groups)
    of_b = (rank * width for _, width in widths.values())
    return max((*of_a, *of_b), default=0)
