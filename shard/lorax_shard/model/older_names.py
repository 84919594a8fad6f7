"""What older releases of transformers called the modules of a mixture, by transformers' own rules.

A checkpoint of a mixture holds a matrix for each expert and linear, under names of the time when
these were modules. transformers stacks and renames them when it loads one, by rules that it keeps
for each family; adapters of that time have the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    rename_source_key,
)

_WEIGHT = ".weight"
# Stands for the number of an expert in a name.
ANY_EXPERT = "*"
_STACKING = (MergeModulelist, Concatenate)


class OlderNames:
    """The older names of one model's modules."""

    def __init__(self, model: nn.Module) -> None:
        rules: list[WeightTransform] = []
        if isinstance(model, PreTrainedModel):
            rules = get_model_conversion_mapping(model, add_legacy=False)
        # Others put a prefix before every name, or take one away.
        self._renamings = [rule for rule in rules if type(rule) is WeightRenaming]
        self._stackings = [rule for rule in rules if _is_stacking(rule)]
        self._back = [rule.reverse_transform() for rule in reversed(self._renamings)]

    def of_experts(self, name: str) -> tuple[str, ...]:
        """Return the linears that became a parameter of experts, in the order of its outputs.

        ``*`` stands in them for the number of the expert. Empty: there is no rule that tells.
        """
        for rule in self._stackings:
            end = rule.target_patterns[0]
            if name.endswith(end) and _begins_a_part(name, end):
                before = name.removesuffix(end)
                sources = [source.replace("\\", "") for source in rule.source_patterns]
                return self._checked([before + source for source in sources], name)
        return ()

    def of_module(self, name: str) -> str:
        """Return the older name of a module; empty: it has kept its name."""
        now = name + _WEIGHT
        older = self._renamed(now)
        is_known = older != now and apply_renamings(older, self._renamings) == now
        return older.removesuffix(_WEIGHT) if is_known and older.endswith(_WEIGHT) else ""

    def _checked(self, sources: Sequence[str], name: str) -> tuple[str, ...]:
        """Return the older names of linears if transformers turns them into the parameter."""
        found = []
        for source in sources:
            one = self._renamed(source.replace(ANY_EXPERT, "0"))
            now, _ = rename_source_key(one, self._renamings, self._stackings)
            if now != name or not one.endswith(_WEIGHT) or ".0." not in one:
                return ()
            before, _, after = one.removesuffix(_WEIGHT).rpartition(".0.")
            found.append(f"{before}.{ANY_EXPERT}.{after}")
        return tuple(found)

    def _renamed(self, name: str) -> str:
        older: str = apply_renamings(name, self._back)
        return older


def _is_stacking(rule: WeightTransform) -> bool:
    """Whether a rule stacks the linears of experts and changes nothing else."""
    if not isinstance(rule, WeightConverter) or len(rule.target_patterns) > 1:
        return False
    kinds = [type(each) for each in rule.operations]
    return MergeModulelist in kinds and all(each in _STACKING for each in kinds)


def _begins_a_part(name: str, end: str) -> bool:
    """Whether the end of a name is one of whole parts."""
    return end.startswith(".") or len(name) == len(end) or name[-len(end) - 1] == "."
