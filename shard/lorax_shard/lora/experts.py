"""Low-rank parts of experts: one grouped product for all pairs of expert and adapter in a step.

A mixture sends each token to some of its experts. Row i of a step's pairs is token t at expert e;
with the adapter in slot s it computes with matrices of its own, those of the number s * E + e,
where E is how many experts a block has. So a pair of slot and expert is to the kernels what a
slot is elsewhere: ranks differ freely, pairs without an adapter are skipped, and of an adapter's
bytes only those of experts are read that the step's tokens go to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from lorax_shard.lora.assignment import BASE, Assignment
from lorax_shard.lora.backend import ExpertsWeights, GroupWeights, LoraBackend, LoraGroup
from lorax_shard.lora.patches import CurrentStep, ModulePatch
from lorax_shard.lora.sites import Site
from lorax_shard.mixture.forward import compute
from lorax_shard.mixture.layout import ExpertsLayout
from lorax_shard.mixture.pairs import Pairs, ToldFunction, route
from lorax_shard.transfer import to_device


class ExpertsPatch(ModulePatch):
    """The experts of one block: takes over for steps in which an adapter changes some.

    ``per_slot`` is the distance between the numbers of two slots: the most experts of a block.
    """

    def __init__(
        self,
        sites: dict[str, Site],
        layout: ExpertsLayout,
        current: CurrentStep,
        backend: LoraBackend,
        per_slot: int,
    ) -> None:
        up = next(iter(sites.values()))
        super().__init__(up, current)
        self._backend, self._layout, self._per_slot = backend, layout, per_slot
        self._num_experts = up.num_experts
        self._groups = {name: backend.make_group(1) for name in sites}
        self._loaded: dict[int, list[str]] = {}
        self._widths = {name: site.widths[1] for name, site in sites.items()}
        self._names = dict(zip((layout.up, layout.down), sites, strict=True))
        # Made once: it is the same for all steps whose pairs are laid out as they are made.
        self._of_told: Mapping[str, FactorsOfPairs] | None = None

    def load_part(self, slot: int, name: str, weights: ExpertsWeights) -> None:
        """Take a slot's matrices for one of the block's parameters."""
        self._groups[name].load_experts(slot * self._per_slot, weights)
        self._loaded.setdefault(slot, []).append(name)
        self._set_mask(self.mask | 1 << slot)

    def unload(self, slot: int) -> None:
        """Let a slot's matrices go; no error if it has none."""
        for name in self._loaded.pop(slot, ()):
            self._groups[name].unload_experts(slot * self._per_slot, self._num_experts)
        super().unload(slot)

    def reserve(self, rank: int) -> None:
        """Fix the grids of launches for adapters of such a rank, and take part in them; 0 ends it."""
        for name, group in self._groups.items():
            group.reserve(ranks=rank, widths=[self._widths[name] if rank else 0])
        self.pin(pinned=bool(rank))

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self._current.step
        if step is None or not self._takes_part(step.tokens):
            return self._base(x, *args, **kwargs)
        if self._layout.is_repeated:
            return self._repeated(x, step.tokens)
        return self._routed(x, step.tokens, *args, **kwargs)

    def _routed(
        self, x: torch.Tensor, rows: Assignment, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute tokens (T x hidden) of which each goes to k experts (T x k)."""
        self._check_rows(len(x), rows)
        add = AdditionsOfStep(self, _slots(rows, x.device))
        return compute(self.site.module, self._layout, x, chosen, weights, add)

    def _repeated(self, x: torch.Tensor, rows: Assignment) -> torch.Tensor:
        """Compute all tokens at each expert: (experts * T) x hidden, zeros where one does not go."""
        module: Any = self.site.module
        num_experts = self._num_experts
        self._check_rows(len(x) // num_experts, rows)
        experts = torch.arange(num_experts, device=x.device).repeat_interleave(rows.num_rows)
        slots = torch.where(x.any(1), _slots(rows, x.device).repeat(num_experts), BASE)
        up, down = (module.get_parameter(each) for each in (self._layout.up, self._layout.down))
        additions = AdditionsOfStep(self, slots)
        pairs = route(experts[:, None], x, up, down, add=additions)
        add = additions.of(pairs)
        y = pairs.multiply(x, None, up, add[self._layout.up], in_first=True)
        gate, up = y.chunk(2, dim=-1)
        x = up * module.act_fn(gate)
        return pairs.multiply(x, None, down, add[self._layout.down], in_first=True)

    def told(self, num_pairs: int) -> ToldFunction | None:
        """Return what lays out the pairs of a step as soon as they are made; None: nothing does."""
        return self._backend.told_of_pairs(num_pairs, self._per_slot)

    def additions(self, pairs: Pairs, slots: torch.Tensor) -> Mapping[str, FactorsOfPairs]:
        """Return what the adapters of a step add, by parameter; ``slots`` are its tokens'."""
        if not pairs.is_told:
            return self._factors(self._backend.assign_pairs(pairs, slots, self._per_slot))
        if self._of_told is None:
            self._of_told = self._factors(self._backend.told_pairs)
        return self._of_told

    def _factors(self, rows: Assignment) -> Mapping[str, FactorsOfPairs]:
        return {
            name: FactorsOfPairs(self._groups[of_site], rows)
            for name, of_site in self._names.items()
        }


class AdditionsOfStep(NamedTuple):
    """What the adapters of a step add to a block of experts."""

    patch: ExpertsPatch
    slots: torch.Tensor

    def told(self, num_pairs: int) -> ToldFunction | None:
        """Return what is told of the pairs as soon as they are made."""
        return self.patch.told(num_pairs)

    def of(self, pairs: Pairs) -> Mapping[str, FactorsOfPairs]:
        """Return what is added to products, by parameter."""
        return self.patch.additions(pairs, self.slots)


class FactorsOfPairs:
    """What one parameter's low-rank matrices add to the product of a step's pairs."""

    def __init__(self, group: LoraGroup, rows: Assignment) -> None:
        self._group, self._rows = group, rows
        self.told = group.told

    def add(self, x: torch.Tensor, tokens: torch.Tensor | None, y: torch.Tensor) -> None:
        """Add to ``y`` now."""
        x = x if tokens is None else x[tokens]
        self._group.expand(self._group.shrink(x, self._rows), 0, y, self._rows)


def _slots(rows: Assignment, device: torch.device) -> torch.Tensor:
    """Return the slot of each token on the device; sent there once a step."""
    if rows.slots_there is None:
        rows.slots_there = to_device(torch.from_numpy(rows.slot_of_row), device)
    return rows.slots_there.contiguous()


class RouterPatch(ModulePatch):
    """A router: what its weight gives for the rows of the slots gets their low-rank parts.

    Routers choose within their forward, so the product with the weight is changed there.
    """

    def __init__(self, site: Site, current: CurrentStep, backend: LoraBackend) -> None:
        super().__init__(site, current)
        self.group = backend.make_group(1)

    def reserve(self, rank: int) -> None:
        """Fix the grids of launches for adapters of such a rank, and take part in them; 0 ends it."""
        width = len(self.site.module.get_parameter("weight"))
        self.group.reserve(ranks=rank, widths=[width if rank else 0])
        self.pin(pinned=bool(rank))

    def load_low_rank(self, slot: int, weights: GroupWeights) -> None:
        """Take a slot's matrices."""
        self.group.load(slot, weights)
        self._set_mask(self.mask | 1 << slot)

    def unload(self, slot: int) -> None:
        """Let a slot's matrices go; no error if it has none."""
        if self.mask >> slot & 1:
            self.group.unload(slot)
        super().unload(slot)

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self._current.step
        if step is None or not self._takes_part(step.tokens):
            return self._base(x, *args, **kwargs)
        with _ChangedLinear(self, step.tokens) as changed:
            y = self._base(x, *args, **kwargs)
        if changed.num_calls != 1:
            raise RuntimeError(
                f"{self.site.name} multiplied {changed.num_calls} times by its weight; adapters "
                "on routers need it once"
            )
        return y

    def compute(self, x: torch.Tensor, rows: Assignment) -> torch.Tensor:
        """Return what low-rank parts add to the scores of ``x`` (T x in)."""
        weight = self.site.module.get_parameter("weight")
        self._check_rows(len(x), rows)
        y = torch.zeros(len(x), len(weight), dtype=weight.dtype, device=x.device)
        self.group.expand(self.group.shrink(x.to(weight.dtype), rows), 0, y, rows)
        return y


class _ChangedLinear(torch.overrides.TorchFunctionMode):
    """Within, products with a router's weight, whatever type it is cast to, are changed."""

    def __init__(self, patch: RouterPatch, rows: Assignment) -> None:
        super().__init__()
        self._patch, self._rows = patch, rows
        self._shape = patch.site.module.get_parameter("weight").shape
        self.num_calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is functional.linear and args[1].shape == self._shape:
            self.num_calls += 1
            x = args[0].reshape(self._rows.num_rows, -1)
            y = y + self._patch.compute(x, self._rows).to(y.dtype).view(y.shape)
        return y
