"""Low-rank parts of experts: one grouped product for all pairs of expert and adapter in a step.

A mixture sends each token to some of its experts. Row i of a step's pairs is token t at expert e;
with the adapter in slot s it computes with matrices of its own, those of the number s * E + e,
where E is how many experts a block has. So a pair of slot and expert is to the kernels what a
slot is elsewhere: ranks differ freely, pairs without an adapter are skipped, and of an adapter's
bytes only those of experts are read that the step's tokens go to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from lorax_shard.lora.assignment import BASE, Assignment
from lorax_shard.lora.backend import ExpertsWeights, GroupWeights, LoraBackend
from lorax_shard.lora.experts_layout import ExpertsLayout
from lorax_shard.lora.patches import CurrentStep, ModulePatch
from lorax_shard.lora.sites import Site
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
        self._up, self._down = sites

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
        self,
        hidden_states: torch.Tensor,
        rows: Assignment,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute T x hidden for tokens of which each goes to k experts (T x k), in pairs."""
        self._check_rows(len(hidden_states), rows)
        num_tokens, k = top_k_index.shape
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        tokens = order // k
        pairs = self._pairs(experts, _slots(rows, hidden_states.device)[tokens])
        y = self._experts(hidden_states[tokens], pairs)
        y = y * top_k_weights.reshape(-1)[order, None]
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        summed = y[places].view(num_tokens, k, -1).sum(1)
        return summed.to(hidden_states.dtype)

    def _repeated(self, x: torch.Tensor, rows: Assignment) -> torch.Tensor:
        """Compute all tokens at each expert: (experts * T) x hidden, zeros where one does not go."""
        num_experts = self._num_experts
        self._check_rows(len(x) // num_experts, rows)
        experts = torch.arange(num_experts, device=x.device).repeat_interleave(rows.num_rows)
        slots = _slots(rows, x.device).repeat(num_experts)
        return self._experts(x, self._pairs(experts, torch.where(x.any(1), slots, BASE)))

    def _pairs(self, experts: torch.Tensor, slots: torch.Tensor) -> _PairRows:
        """Say which rows, sorted by expert, are whose."""
        numbers = torch.where(slots == BASE, BASE, slots * self._per_slot + experts)
        counts = torch.bincount(experts, minlength=self._num_experts)
        ends = counts.cumsum(0, dtype=torch.int32)
        return _PairRows(experts, ends, self._backend.assign(numbers))

    def _experts(self, x: torch.Tensor, pairs: _PairRows) -> torch.Tensor:
        """Compute each row (S x hidden) at its expert."""
        module: Any = self.site.module
        y = self._linear(self._up, x, pairs)
        if self._layout.is_repeated:
            gate, up = y.chunk(2, dim=-1)
            y = up * module.act_fn(gate)
        else:
            y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = self._linear(self._down, y, pairs)
        return module.post_expert_norm(y) if getattr(module, "has_post_expert_norm", False) else y

    def _linear(self, name: str, x: torch.Tensor, pairs: _PairRows) -> torch.Tensor:
        module, own = self.site.module, name.rpartition(".")[2]
        weight = module.get_parameter(own)
        y = _grouped_product(x, weight if self._layout.is_in_first else weight.mT, pairs.ends)
        bias = getattr(module, f"{own}_bias", None)
        if bias is not None:
            y += bias[pairs.experts]
        group = self._groups[name]
        group.expand(group.shrink(x, pairs.rows), 0, y, pairs.rows)
        return y


class _PairRows(NamedTuple):
    """Rows of a token at an expert each, expert by expert."""

    experts: torch.Tensor  # S
    ends: torch.Tensor  # where the rows of each expert end
    rows: Assignment


def _slots(rows: Assignment, device: torch.device) -> torch.Tensor:
    """Return the slot of each token on the device; sent there once a step."""
    if rows.slots_there is None:
        rows.slots_there = to_device(torch.from_numpy(rows.slot_of_row), device)
    return rows.slots_there


def _grouped_product(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiply rows that are sorted by expert (S x in) with their expert's matrix (in x out)."""
    y: torch.Tensor = functional.grouped_mm(x, weights, offs=ends)
    return y


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
