"""The adapters of one model: loaded by slot, applied to the rows of each step.

Two lanes. ``prepare`` checks, converts and copies; it changes nothing and may run on any
thread beside a step. ``load`` and ``unload`` belong to the thread that computes steps, and
only exchange references.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lorax_shard.lora.assignment import (
    BASE,
    Assignment,
    FixedAssignment,
    IdArray,
    LoraStep,
    make_step,
)
from lorax_shard.lora.backend import LoraBackend
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.lora.experts import ExpertsPatch, RouterPatch
from lorax_shard.lora.patches import (
    CurrentStep,
    EmbeddingPatch,
    LinearPatch,
    Patch,
    SharedGroup,
    VectorPatch,
)
from lorax_shard.lora.prepare import Cut, Preparer
from lorax_shard.lora.prepared import PreparedAdapter
from lorax_shard.lora.registry import BACKENDS
from lorax_shard.lora.sites import Kind, Site, find_experts, find_groups, find_sites
from lorax_shard.mixture.layout import layout_of


def install(
    model: nn.Module,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    whole: nn.Module | None = None,
    cut: Cut | None = None,
    outputs: Collection[str] = (),
) -> LoraModel:
    """Make a model ready for adapters; comes after whatever replaces its linears.

    ``backend`` is 'auto' or a name of the registry. A model that is one rank's part brings the
    ``whole`` one, without values, and how adapters are ``cut``. ``outputs`` are the linears that
    compute scores of labels. Raises StartupError (BACKEND_UNAVAILABLE).
    """
    return LoraModel(
        model, BACKENDS.create(backend, device, dtype), device, dtype, whole=whole, cut=cut,
        outputs=outputs,
    )  # fmt: skip


class LoraModel:
    """Owns the slots of one model."""

    def __init__(
        self,
        model: nn.Module,
        backend: LoraBackend,
        device: torch.device,
        dtype: torch.dtype,
        *,
        whole: nn.Module | None = None,
        cut: Cut | None = None,
        outputs: Collection[str] = (),
    ) -> None:
        self.backend = backend.name
        self._backend, self._dtype = backend, dtype
        # One of its own: its slots are pairs of a slot and an expert.
        self._expert_backend = backend.another()
        self.sites = find_sites(model, whole, outputs)
        self._model, self._device = model, device
        self._current = CurrentStep()
        members = list(find_groups(self.sites))
        self._preparer = Preparer(
            self.sites, members, dtype, device, cut,
            keeps_stored=backend.keeps_stored, pack=backend.pack,
        )  # fmt: skip
        self._routers = {
            site.name: RouterPatch(site, self._current, backend)
            for site in self._of_kind(Kind.ROUTER)
        }
        # By parameter: those of a module are one patch.
        self._most_experts = max((site.num_experts for site in self.sites.values()), default=0)
        self._experts = self._make_experts(self._expert_backend)
        self._slots: dict[int, PreparedAdapter] = {}
        # Slots of adapters that have low-rank parts of linears before the head, and change nothing
        # else of a pass.
        self._low_rank_alone: set[int] = set()
        # What graphs have room for.
        self._fixed_slots = self._fixed_rank = 0
        self._groups = [SharedGroup(backend.make_group(len(each)), len(each)) for each in members]
        self._members = members
        self._linears = {
            site.name: LinearPatch(site, self._current, group, member)
            for group, sites in zip(self._groups, members, strict=True)
            for member, site in enumerate(sites)
        }
        self._embeddings = {
            site.name: EmbeddingPatch(site, self._current) for site in self._of_kind(Kind.EMBEDDING)
        }
        self._vectors = {
            site.name: VectorPatch(site, self._current) for site in self._of_kind(Kind.VECTOR)
        }
        # Slots whose rows have other logits than the base's.
        self._slots_to_mask: set[int] = set()
        self._mask_hook: Any = None

    @property
    def keeps_stored(self) -> bool:
        """Whether low-rank matrices of linears keep the types in which adapters bring them."""
        return self._backend.keeps_stored

    @property
    def slots(self) -> dict[int, str]:
        """The loaded slots and the digests of their adapters."""
        return {slot: adapter.digest for slot, adapter in self._slots.items()}

    def digest(self, slot: int) -> str:
        """Return the digest of a loaded slot's adapter."""
        return self._slot(slot).digest

    @property
    def ties_embeddings(self) -> bool:
        """Whether the base's head uses the weight of its input embedding."""
        config: Any = getattr(self._model, "config", None)
        return config is not None and bool(
            getattr(config.get_text_config(), "tie_word_embeddings", False)
        )

    @contextmanager
    def fixed(self, num_slots: int, rank: int) -> Iterator[None]:
        """Within, launches of steps by ``fixed_step`` follow from the number of rows alone.

        Graphs that are captured of them compute with what is loaded at their replay, in slots
        that ``is_fixed`` names, as long as ``fixed_version`` is the same. ``rank`` is the largest
        that they have room for. RuntimeError where the backend cannot be captured.
        """
        self._backend.reserve(num_slots, self._device)
        if self._experts:
            self._expert_backend.reserve(num_slots * self._most_experts, self._device)
        self._fixed_slots, self._fixed_rank = num_slots, rank
        linears = [patch for patch in self._linears.values() if not patch.site.is_head]
        reserved: list[SharedGroup | RouterPatch | ExpertsPatch]
        reserved = [*self._groups, *self._routers.values(), *set(self._experts.values())]
        try:
            for group in reserved:
                group.reserve(rank)
            for patch in linears:
                patch.pin(pinned=True)
            yield
        finally:
            for patch in linears:
                patch.pin(pinned=False)
            for group in reserved:
                group.reserve(0)

    @property
    def fixed_version(self) -> int:
        """Changes when graphs that were captured before look in the wrong place for slots."""
        return self._backend.version + self._expert_backend.version

    def is_fixed(self, slot: int) -> bool:
        """Return whether graphs compute all that a slot's adapter changes.

        They have low-rank parts of linears before the head, of experts and routers, up to their
        rank.
        """
        adapter = self._slot(slot)
        return (
            slot in self._low_rank_alone
            and slot < self._fixed_slots
            and adapter.max_rank <= self._fixed_rank
        )

    @contextmanager
    def fixed_step(self, slots: torch.Tensor) -> Iterator[None]:
        """Apply to the rows of one token within the adapters in ``slots`` (int64, -1: none).

        They are read on the device, so that a graph has what stands there at its replay.
        """
        assert self._current.step is None, "steps do not nest"
        rows = FixedAssignment(slots)
        self._backend.read_slots(rows, slots)
        self._current.step = LoraStep(rows, None)
        try:
            yield
        finally:
            self._current.step.end()
            self._current.step = None

    @property
    def kernels(self) -> frozenset[str]:
        """The names of the kernels that add what adapters change, where a CPU's steps are kept."""
        return self._backend.kernels

    def write_fixed_slots(self, slot_of_row: IdArray) -> None:
        """Have kernel calls that were kept of a fixed step compute with these slots next.

        On a CPU: one slot a row (-1: none), of another number of rows too. They stand until
        they are written again or another fixed step begins.
        """
        self._backend.write_slots(slot_of_row)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile whatever steps with adapters may ask of the backend; comes before any step."""
        for group in self._groups:
            group.warm_up(self._dtype, self._device)

    def prepare(self, adapter: HostAdapter) -> PreparedAdapter:
        """Check an adapter against the model and copy it to the device; any thread.

        AdapterMismatchError says in words what does not fit.
        """
        return self._preparer.prepare(adapter)

    def load(self, slot: int, adapter: HostAdapter | PreparedAdapter) -> None:
        """Put an adapter into an empty slot; what fails leaves the slot empty."""
        if slot < 0:
            raise ValueError(f"slot {slot}: slots are numbered from 0")
        if slot in self._slots:
            raise ValueError(f"slot {slot} holds an adapter; unload it first")
        if self._current.step is not None:
            raise RuntimeError("adapters change between steps only")
        if isinstance(adapter, HostAdapter):
            adapter = self.prepare(adapter)
        with ExitStack() as undo:
            self._put(slot, adapter, undo)
            undo.pop_all()

    def _put(self, slot: int, adapter: PreparedAdapter, undo: ExitStack) -> None:
        """Load all parts; ``undo`` learns how each that is loaded is let go."""
        for number, weights in adapter.groups.items():
            group = self._groups[number]
            group.load(slot, weights)
            undo.callback(group.unload, slot)
            for site, b in zip(self._members[number], weights.b, strict=True):
                if b is not None:
                    undo.callback(self._linears[site.name].unload, slot)
                    self._linears[site.name].load_low_rank(slot)
        self._put_mixtures(slot, adapter, undo)
        changes: tuple[tuple[Mapping[str, Patch[Any]], Mapping[str, Any]], ...] = (
            (self._linears, adapter.linears),
            (self._embeddings, adapter.embeddings),
            (self._vectors, adapter.vectors),
        )
        for patches, of_adapter in changes:
            for name, change in of_adapter.items():
                undo.callback(patches[name].unload, slot)
                patches[name].load(slot, change)
        self._commit()
        undo.callback(self._forget, slot)
        self._slots[slot] = adapter
        if adapter.num_logits:
            self._slots_to_mask.add(slot)
        if not self._changes_more(adapter):
            self._low_rank_alone.add(slot)
        self._update_mask_hook()

    def _changes_more(self, adapter: PreparedAdapter) -> bool:
        """Return whether an adapter changes more of a pass than low-rank parts before the head add."""
        others = (*adapter.linears, *adapter.embeddings, *adapter.vectors)
        return (
            bool(adapter.num_logits)
            or any(not self.sites[name].is_after_pass for name in others)
            or any(self._members[each][0].is_head for each in adapter.groups)
        )

    def _put_mixtures(self, slot: int, adapter: PreparedAdapter, undo: ExitStack) -> None:
        for name, weights in adapter.routers.items():
            undo.callback(self._routers[name].unload, slot)
            self._routers[name].load_low_rank(slot, weights)
        for name, of_experts in adapter.experts.items():
            undo.callback(self._experts[name].unload, slot)
            self._experts[name].load_part(slot, name, of_experts)

    def _make_experts(self, backend: LoraBackend) -> dict[str, ExpertsPatch]:
        of_modules = list(find_experts(self.sites))
        found: dict[str, ExpertsPatch] = {}
        for sites in of_modules:
            layout = layout_of(next(iter(sites.values())).module)
            assert layout is not None
            patch = ExpertsPatch(sites, layout, self._current, backend, self._most_experts)
            found |= dict.fromkeys(sites, patch)
        return found

    def _commit(self) -> None:
        for backend in (self._backend, self._expert_backend):
            backend.commit(self._device)

    def _forget(self, slot: int) -> None:
        del self._slots[slot]
        self._slots_to_mask.discard(slot)
        self._low_rank_alone.discard(slot)
        self._update_mask_hook()

    def unload(self, slot: int) -> None:
        """Empty a slot; its memory is free when the last step with it is done."""
        if self._current.step is not None:
            raise RuntimeError("adapters change between steps only")
        adapter = self._slot(slot)
        for number in adapter.groups:
            self._groups[number].unload(slot)
            for site in self._members[number]:
                self._linears[site.name].unload(slot)
        for name in adapter.routers:
            self._routers[name].unload(slot)
        for name in adapter.experts:
            self._experts[name].unload(slot)
        for name in adapter.linears:
            self._linears[name].unload(slot)
        for name in adapter.embeddings:
            self._embeddings[name].unload(slot)
        for name in adapter.vectors:
            self._vectors[name].unload(slot)
        self._commit()
        # Last: a slot that could not be emptied is never used again.
        self._forget(slot)

    @contextmanager
    def step(
        self,
        lens: Sequence[int],
        slots: Sequence[int | None],
        logit_rows: IdArray | torch.Tensor | None = None,
    ) -> Iterator[LoraStep | None]:
        """Apply adapters to the forward pass within: run i has ``lens[i]`` tokens.

        ``slots[i]`` is its slot, None for the base model. ``logit_rows`` are the token numbers
        that the head computes; None: all. A slot that is not loaded is a ValueError: no row
        ever computes with less than it asked for.
        """
        assert self._current.step is None, "steps do not nest"
        for slot in slots:
            if slot is not None:
                self._slot(slot)
        step = make_step(lens, slots, logit_rows, self._device)
        self._current.step = step
        try:
            yield step
        finally:
            self._current.step = None
            if step is not None:
                step.end()

    @property
    def is_in_step(self) -> bool:
        """Whether adapters are in effect."""
        return self._current.step is not None

    @property
    def tokens_by_slot(self) -> list[slice | torch.Tensor]:
        """The tokens of the step that is computed: those of the base, if there are, then of each slot."""
        step = self._current.step
        if step is None:
            return [slice(None)]
        return [step.tokens.rows(slot) for slot in _slots_in(step)]

    @contextmanager
    def aside(self, num_rows: int) -> Iterator[None]:
        """Within a step, modules compute ``num_rows`` rows of something else for each of its slots.

        The slots' rows follow each other, in the order of ``tokens_by_slot``.
        """
        step = self._current.step
        if step is None:
            yield
            return
        slots = np.array(_slots_in(step), dtype=np.int64)
        own = LoraStep(Assignment(np.repeat(slots, num_rows), self._device), None)
        self._current.step = own
        try:
            yield
        finally:
            own.end()
            self._current.step = step

    def num_logits(self, slot: int | None) -> int:
        """Return how many logits rows of a slot have; later columns are -inf."""
        head = next(site for site in self.sites.values() if site.is_head)
        if slot is None:
            return head.out_features
        return self._slot(slot).num_logits or head.out_features

    def num_outputs(self, slot: int, name: str) -> int:
        """Return how many outputs a linear has for a slot that replaces its weight; else 0."""
        change = self._slot(slot).linears.get(name)
        return 0 if change is None or change.weight is None else change.weight.shape[0]

    def extra_logits(self) -> int:
        """Return how many logits some row of the step has beyond the base's."""
        step = self._current.step
        if step is None:
            return 0
        own = self.num_logits(None)
        return max((0, *(self.num_logits(slot) - own for slot in step.logits.slots)))

    def _slot(self, slot: int) -> PreparedAdapter:
        if slot not in self._slots:
            raise ValueError(f"slot {slot} holds no adapter")
        return self._slots[slot]

    def _of_kind(self, kind: Kind) -> Iterator[Site]:
        return (site for site in self.sites.values() if site.kind is kind)

    def _update_mask_hook(self) -> None:
        """Mask logits after the whole model: what follows a head may lift -inf, as a softcap does."""
        is_needed = bool(self._slots_to_mask)
        if is_needed and self._mask_hook is None:
            hook = functools.partial(self._mask_logits)
            self._mask_hook = self._model.register_forward_hook(hook)
        elif not is_needed and self._mask_hook is not None:
            self._mask_hook.remove()
            self._mask_hook = None

    def _mask_logits(self, module: nn.Module, args: Any, output: Any) -> None:
        step = self._current.step
        if step is None:
            return
        logits: torch.Tensor = output.logits
        logits = logits.view(-1, logits.shape[-1])
        rows = step.logits
        if any(self._slots[slot].num_logits for slot in rows.slots):
            own = torch.full((rows.num_rows,), self.num_logits(None), device=logits.device)
            for slot in rows.slots:
                own[rows.rows(slot)] = self.num_logits(slot)
            columns = torch.arange(logits.shape[1], device=logits.device)
            logits.masked_fill_(columns >= own[:, None], float("-inf"))


def _slots_in(step: LoraStep) -> list[int]:
    """Return the slots of a step, BASE before the others if there are base rows."""
    has_base = bool((step.tokens.slot_of_row == BASE).any())
    return [BASE, *step.tokens.slots] if has_base else [*step.tokens.slots]
