"""Several adapters as one, by the rules of PEFT's add_weighted_adapter.

PEFT combines A and B apart, each with the root of the weight, so the product has terms that
cross adapters (``cat`` has none). The merge changes every module that some adapter changes;
adapters without a module take no part in it. (PEFT itself hands the first adapter's choice of
layers on to the merge, and loses what the others change elsewhere: here adapters count that
compute the same, written with the full names of their modules.) Where PEFT gives no sensible result (magnitudes of DoRA,
replaced weights, a first adapter with rsLoRA), the merge is refused. PEFT merges no adapters of
experts; here each expert is merged as a linear would be, but by TIES, which prunes whole tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from lorax_contract.adapters import Combination, MajoritySign, MergeSpec
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.digest import digest_adapter
from lorax_shard.peft.errors import AdapterRefusedError, listing
from lorax_shard.peft.merge_math import add, disjoint_add, keep_largest, keep_random


def merge_digest(spec: MergeSpec, digests: Sequence[str]) -> str:
    """Return what names a merge of adapters with these digests, before it is computed."""
    words = ["lorax-merge-1", *spec.words, *digests]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def merge(adapters: Sequence[HostAdapter], spec: MergeSpec) -> HostAdapter:
    """Return the merged adapter, in float32; raises AdapterRefusedError.

    Give the adapters with the values that are stored, or widened to float32: then the result
    depends on their digests and the spec only, and every rank and every reload gets the same.
    """
    if len(adapters) != len(spec.weights):
        raise AdapterRefusedError(
            f"a merge of {len(adapters)} adapters needs as many weights, not {len(spec.weights)}"
        )
    _refuse_unmergeable(adapters)
    seed = merge_digest(spec, [adapter.digest for adapter in adapters])
    names = {name: None for adapter in adapters for name in adapter.modules}
    modules = {name: _Module(name, adapters, spec, seed).merged() for name in names}
    return digest_adapter(HostAdapter(digest="", modules=modules))


def _refuse_unmergeable(adapters: Sequence[HostAdapter]) -> None:
    for number, adapter in enumerate(adapters, start=1):
        for name, delta in adapter.modules.items():
            what = _unmergeable(delta)
            if what:
                raise AdapterRefusedError(
                    f"adapter {number} of the merge cannot be merged: it has {what} for {name}"
                )
        if adapter.invocation_ids:
            raise AdapterRefusedError(
                f"adapter {number} of the merge cannot be merged: it acts on a part of the prompt "
                "only (alora_invocation_tokens), and a merge acts on all of it; name it alone"
            )
        if adapter.vocab_size:
            raise AdapterRefusedError(
                f"adapter {number} of the merge cannot be merged: it adds tokens"
            )
    if "rslora" in adapters[0].traits:
        raise AdapterRefusedError(
            "the first adapter of the merge uses rsLoRA, whose merge PEFT scales by the root of "
            "the rank once too often; name an adapter without rsLoRA first"
        )


def _unmergeable(delta: ModuleDelta) -> str:
    parts = {
        "a DoRA magnitude": delta.magnitude,
        "a bias of lora_B": delta.b_bias,
        "a trained bias": delta.bias,
        "a weight of its own": delta.weight,
        "replaced rows": delta.token_rows,
    }
    return next((what for what, tensor in parts.items() if tensor is not None), "")


class _Module:
    """Merges one module."""

    def __init__(
        self, name: str, adapters: Sequence[HostAdapter], spec: MergeSpec, seed: str
    ) -> None:
        self._name = name
        self._spec = spec
        self._seed = seed
        # Adapters without this module take no part in it, as in PEFT.
        self._numbers = [n for n, adapter in enumerate(adapters) if name in adapter.modules]
        self._deltas = [adapters[number].modules[name] for number in self._numbers]
        self._weights = [
            spec.weights[number] * delta.scaling
            for number, delta in zip(self._numbers, self._deltas, strict=True)
        ]
        # PEFT merges a single adapter linearly, whatever is asked for.
        alone = len(adapters) == 1
        self._combination = Combination.LINEAR if alone else spec.combination

    def merged(self) -> ModuleDelta:
        """Return the module's merged delta; its scaling is 1."""
        downs, ups = self._tensors("a"), self._tensors("b")
        if self._combination is Combination.TIES and downs[0].dim() > len(("rank", "in")):
            raise AdapterRefusedError(
                f"adapters of experts cannot be merged by ties, which keeps the largest values of a "
                f"matrix and not of a stack of them ({self._name}); merge by linear, cat or dare"
            )
        if self._combination is Combination.CAT:
            scaled = [down * weight for down, weight in zip(downs, self._weights, strict=True)]
            return ModuleDelta(a=torch.cat(scaled, dim=-2), b=torch.cat(ups, dim=-1))
        ranks = sorted({down.shape[-2] for down in downs})
        if len(ranks) > 1:
            raise AdapterRefusedError(
                f"adapters of the ranks {listing([str(rank) for rank in ranks])} can be merged "
                f"by cat only, not by {self._combination.value} ({self._name})"
            )
        roots = [math.sqrt(abs(weight)) for weight in self._weights]
        # The sign goes to one side; on both it would cancel.
        signed = [math.copysign(root, weight) for root, weight in zip(roots, self._weights)]
        return ModuleDelta(a=self._combine(downs, signed, "a"), b=self._combine(ups, roots, "b"))

    def _tensors(self, part: str) -> list[torch.Tensor]:
        tensors = [getattr(delta, part) for delta in self._deltas]
        # PEFT widens adapters to float32 when it loads them.
        return [tensor.to(torch.float32) for tensor in tensors]

    def _combine(
        self, tensors: list[torch.Tensor], weights: list[float], part: str
    ) -> torch.Tensor:
        kept = self._pruned(tensors, part)
        if self._combination.elects_signs:
            by_frequency = self._spec.majority_sign is MajoritySign.FREQUENCY
            return disjoint_add(kept, weights, by_frequency=by_frequency)
        return add(kept, weights)

    def _pruned(self, tensors: list[torch.Tensor], part: str) -> list[torch.Tensor]:
        density = self._spec.density
        if not self._combination.prunes or density is None or density >= 1:
            return tensors
        if self._combination is Combination.TIES:
            return [keep_largest(tensor, density) for tensor in tensors]
        return [
            keep_random(tensor, density, f"{self._seed}/{self._name}/{part}/{number}")
            for tensor, number in zip(tensors, self._numbers, strict=True)
        ]
