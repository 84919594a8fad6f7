"""Quantizes one rank's part of a model: its numbers are those that one rank alone would have.

Scales of int8 belong to whole rows. Where a rank has some inputs of a linear only, it reads the
whole weight once to know what is largest in each row; blocks of GGUF files are cut between blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorax_contract.config import Quantize, ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.linear.quantized.device import fits
from lorax_shard.linear.quantized.formats import (
    FP8,
    INT4,
    QuantizedWeight,
    to_bfloat16,
    to_fp8,
    to_int4,
    to_int8,
)
from lorax_shard.linear.quantized.gguf_blocks import block_size
from lorax_shard.linear.quantized.install import quantize, quantize_each
from lorax_shard.linear.targets import LinearTarget
from lorax_shard.mixture.narrow import round_experts
from lorax_shard.model.quantized import for_device, is_head, read_blocks
from lorax_shard.parallel.load import LoadedRank
from lorax_shard.parallel.plan import RankPlan, Role

# Reads a module's whole weight by its name; None where the files have none under it.
ReadWeight = Callable[[str], torch.Tensor | None]


def quantize_part(
    part: LoadedRank, config: ShardConfig
) -> tuple[dict[str, QuantizedWeight], ReadWeight]:
    """Quantize a rank's linears; return them, and what reads whole weights as they are served.

    Raises StartupError (MODEL_UNSUPPORTED), naming the matrix, where a format cannot be cut.
    """
    read = part.checkpoint.weight
    if config.quantize == "none":
        return {}, read
    if config.quantize == "gguf":
        cut = _BlockCut(part.plan)
        return read_blocks(part.model, Path(config.model_dir), cut.read), read
    if config.quantize == "bfloat16":
        weights = quantize(part.model, to_bfloat16)
        round_experts(part.model, torch.bfloat16)
        return weights, _rounded(part, set(weights), to_bfloat16)
    if config.quantize == "int8":
        weights = quantize_each(
            part.model,
            lambda target: to_int8(target.weight, _largest(target, part, config.quantize)),
        )
        return weights, _rounded(part, set(weights), to_int8)
    weights = quantize_each(part.model, lambda target: _for_device(target, part, config.quantize))

    return weights, _rounded(part, set(weights), to_int4 if config.quantize == "int4" else to_fp8)


def _for_device(target: LinearTarget, part: LoadedRank, name: Quantize) -> QuantizedWeight | None:
    if is_head(part.model, target):
        return None
    split, group = part.plan.splits.get(target.path), INT4.group_size
    if name == "fp8":
        largest = _largest(target, part, name) if fits(FP8, target.weight.shape) else None
        return for_device(target.weight, name, largest)
    spans = split.spans if split is not None and split.role is Role.ROW else ()
    if any(span.start % group or span.stop % group for span in spans):
        raise StartupError(
            f"--quantize int4: {target.path} has groups of {group} inputs, which "
            f"{part.plan.world_size} shards would cut in two; use another --num-shard, or fp8",
            ExitCode.MODEL_UNSUPPORTED,
        )
    return for_device(target.weight, name)


def _largest(target: LinearTarget, part: LoadedRank, name: Quantize) -> torch.Tensor | None:
    """Return what is largest in each whole row; None where the rank has whole rows."""
    split = part.plan.splits.get(target.path)
    if split is None or split.role is not Role.ROW:
        return None
    whole = part.checkpoint.weight(target.path)
    if whole is None:
        raise StartupError(
            f"--quantize {name}: {target.path} is spread over {part.plan.world_size} shards by its "
            "inputs, and the model's files have no weight of that name to take the scales of whole "
            "rows from; use --num-shard 1, or leave --quantize out",
            ExitCode.MODEL_UNSUPPORTED,
        )
    dim = split.weight_dim
    return torch.maximum(whole.amax(dim), -whole.amin(dim)).to(target.weight.device)


def _rounded(
    part: LoadedRank, places: set[str], make: Callable[[torch.Tensor], QuantizedWeight]
) -> ReadWeight:
    """Return what reads the numbers that quantizing makes of whole weights."""
    places |= _embedding_of_head(part.model, places)
    read = part.checkpoint.weight

    def read_rounded(name: str) -> torch.Tensor | None:
        whole = read(name)
        if whole is None or name not in places:
            return whole
        split = part.plan.splits.get(name)
        is_transposed = split is not None and split.is_transposed
        return make(whole.T).dense().T if is_transposed else make(whole).dense()

    return read_rounded


def _embedding_of_head(model: Any, places: set[str]) -> set[str]:
    """Return the name of the embedding, if a quantized head shares its weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not embedding.weight:
        return set()
    names = {name for name, each in model.named_modules() if each in (head, embedding)}
    return names if names & places else set()


class _BlockCut:
    """Reads what a rank has of a linear's rows of blocks."""

    def __init__(self, plan: RankPlan) -> None:
        self._plan = plan

    def read(self, view: Any, place: str, type_name: str) -> torch.Tensor:
        split = self._plan.splits.get(place)
        if split is None:
            whole: torch.Tensor = view[:]
            return whole
        if split.role is not Role.ROW:
            return torch.cat([view[span.start : span.stop] for span in split.spans])
        inputs, num_bytes = block_size(type_name)
        for span in split.spans:
            if span.start % inputs or span.stop % inputs:
                self._refuse(place, type_name, inputs)
        bounds = [
            (s.start // inputs * num_bytes, s.stop // inputs * num_bytes) for s in split.spans
        ]
        return torch.cat([view[:, start:stop] for start, stop in bounds], dim=1)

    def _refuse(self, place: str, type_name: str, inputs: int) -> None:
        plan = self._plan
        raise StartupError(
            f"--quantize gguf: {place} has blocks of {inputs} inputs ({type_name}), which "
            f"{plan.world_size} shards would cut in two; use another --num-shard, or --quantize int8",
            ExitCode.MODEL_UNSUPPORTED,
        )
