"""Loads one rank's part of a model: transformers builds and converts, we say what is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from lorax_shard.parallel.local import keep_bias_once, make_local
from lorax_shard.parallel.partition import CannotSplitError
from lorax_shard.parallel.plan import RankPlan, Role, base_prefix, make_plan
from lorax_shard.parallel.slices import OLD_NAMES, Checkpoint, RankSlice

# One expert's matrices, as most checkpoints have them; transformers fuses them while loading.
_EXPERT = re.compile(r"\.experts\.\d+\.(?P<matrix>w1|w2|w3|gate_proj|up_proj|down_proj)\.weight$")
_DOWN = ("w2", "down_proj")


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """One rank's part of a model. The ranks do not meet yet: ``local.connect`` comes last."""

    model: Any
    plan: RankPlan
    # What transformers says of missing, unexpected and mismatched tensors.
    report: Mapping[str, Any]
    # The model of full size, on the meta device.
    whole: Any
    checkpoint: Checkpoint


def load_rank(
    files: Mapping[str, Any],
    config: Any,
    *,
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    attention: str,
    backbone: bool = False,
) -> LoadedRank:
    """Load the rank's part of a model, reading no more than that; raises CannotSplitError.

    ``files`` are the open files of its tensors, see ``slices``. Of a ``backbone`` the base model is
    loaded, else the causal one.
    """
    stock: Any = stock_class(config, backbone=backbone)
    plans: list[RankPlan] = []

    class RankModel(stock):  # type: ignore[misc]
        """The stock model, made narrower before any weight is read."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            plans.append(make_plan(self, rank, world_size))
            make_local(self, plans[0])

    # transformers finds its conversions by these.
    RankModel.__name__, RankModel.__qualname__ = stock.__name__, stock.__qualname__
    RankModel.__module__ = stock.__module__
    with torch.device("meta"):
        whole = stock._from_config(config, dtype=dtype)
    plan = make_plan(whole, rank, world_size)
    prefix = base_prefix(whole)
    # What checkpoints of models around a backbone call it.
    around = "" if prefix else whole.base_model_prefix
    checkpoint = Checkpoint(files, prefix, around)
    names = _KeyNames(whole, prefix, around)
    state = {key: _sliced(file, key, plan, names) for key, file in files.items()}
    model, report = RankModel.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    keep_bias_once(model, plan)
    return LoadedRank(model.eval().requires_grad_(False), plan, report, whole, checkpoint)


def stock_class(config: Any, *, backbone: bool) -> Any:
    """Return transformers' causal model of a config, or its backbone; CannotSplitError: it has none."""
    try:
        return (MODEL_MAPPING if backbone else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
    except KeyError:
        raise CannotSplitError(
            f"a {config.model_type} is not built by transformers' own code, and only such models "
            "can be spread over ranks"
        ) from None


class _KeyNames:
    """What a checkpoint's keys may be in the model."""

    def __init__(self, whole: Any, prefix: str, around: str) -> None:
        self._prefix, self._around = prefix, around
        # What transformers does before it converts; keys of matrices that it fuses keep their name.
        self._renamings = [
            each for each in get_model_conversion_mapping(whole) if type(each) is WeightRenaming
        ]

    def of(self, key: str) -> list[tuple[str, str]]:
        """Return the modules, each with its part, that a key may mean."""
        name, _, part = key.rpartition(".")
        name = OLD_NAMES.get(name, name)
        # Older checkpoints leave the base model's prefix out; those of models around it bring one.
        names = (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._around}."))
        renamed = key
        for each in self._renamings:
            renamed, _ = each.rename_source_key(renamed)
        module, _, renamed_part = renamed.rpartition(".")
        return [*((each, part) for each in names), (module, renamed_part)]


def _sliced(file: Any, key: str, plan: RankPlan, names: _KeyNames) -> RankSlice:
    """Return what the rank reads of one tensor of the checkpoint."""
    if (expert := _EXPERT.search(key)) is not None:
        splits = (split for split in plan.splits.values() if split.role is Role.EXPERTS)
        if (split := next(splits, None)) is not None:
            return RankSlice(file, key, 1 if expert["matrix"] in _DOWN else 0, split.spans)
    found = next((each for each in names.of(key) if each[0] in plan.splits), None)
    if found is None:
        return RankSlice(file, key)
    owner, part = plan.splits[found[0]], found[1]
    if owner.parameters:
        if part not in owner.parameters:
            return RankSlice(file, key)
        return RankSlice(file, key, *owner.parameters[part])
    if part == "bias":
        return RankSlice(file, key, None if owner.role is Role.ROW else 0, owner.spans)
    return RankSlice(file, key, owner.weight_dim, owner.spans)
