"""Loads one rank's part of a model, plugged as a whole one is, and lets the ranks meet.

No rank has the model whole, so none can compute what transformers computes of it. The probe
takes a miniature instead: every rank builds the same one, computes it whole by transformers,
and then its own part of it together with the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorax_contract.config import ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard import fused
from lorax_shard.attention import registry
from lorax_shard.attention.backend import AttentionBackend
from lorax_shard.attention.ragged import encoder_attention
from lorax_shard.hashing import tensor_digest
from lorax_shard.lora import model as lora
from lorax_shard.mixture.install import install as install_mixture
from lorax_shard.model import attention_hook, elementwise, miniature, relative_positions
from lorax_shard.model.describe import describe, describe_heads
from lorax_shard.model.encoder import paged_class
from lorax_shard.model.families import generates, is_encoder
from lorax_shard.model.heads import make_heads
from lorax_shard.model.hf_model import HFPagedModel
from lorax_shard.model.probe import (
    ModelProbe,
    miniature_dtype,
    survey_attention,
)
from lorax_shard.model.quantized import install_linears
from lorax_shard.model.rank_heads import own_head
from lorax_shard.model.read_weights import (
    add_generation_config,
    leave_out_pooler,
    reading,
    refuse_missing,
)
from lorax_shard.model.split_quantized import quantize_part
from lorax_shard.model.stored import find_codes, open_weights
from lorax_shard.model.weights import check_weights, weight_files
from lorax_shard.parallel.adapter_parts import AdapterCut
from lorax_shard.parallel.group import RankGroup
from lorax_shard.parallel.load import LoadedRank, load_rank
from lorax_shard.parallel.local import connect
from lorax_shard.parallel.partition import CannotSplitError
from lorax_shard.parallel.slices import in_memory
from lorax_shard.peft.base import BaseDescription
from lorax_shard.threads import one_thread


class RankPart(NamedTuple):
    """One rank's part of a model, and how the engine sees it."""

    loaded: LoadedRank
    paged: HFPagedModel
    backend: AttentionBackend
    exchanged: fused.FusedModules


def load_part(
    config: ShardConfig,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    group: RankGroup,
) -> HFPagedModel:
    """Return the rank's part; its forward pass computes together with the other ranks'."""
    part = read_part(config, hf_config, dtype, device, (group.rank, group.world_size))
    # One rank may read for much longer than a step may take.
    group.wait_for_all("loaded", config.start_timeout_s)
    meet(part, group)
    with one_thread():
        if not config.was_probed:
            _probe(part, config, device, group)
    part.paged.elementwise_backend = part.exchanged.backend
    return part.paged


def read_part(
    config: ShardConfig,
    hf_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    seat: tuple[int, int],
) -> RankPart:
    """Read the part of rank ``seat[0]`` of ``seat[1]`` and plug it; the ranks do not meet yet."""
    folder, encoder = Path(config.model_dir), is_encoder(hf_config)
    files, coded = weight_files(folder), find_codes(folder)
    check_weights(
        files, dtype, device, num_parts=seat[1], parts_here=config.ranks_on_device, coded=coded
    )
    attention_hook.register()
    with _reading_part(folder, device, seat):
        loaded = _load(open_weights(folder, coded), hf_config, dtype, seat)
        loaded.model.to(device)
    if encoder:
        leave_out_pooler(loaded.model, loaded.report)
        loaded.whole.pooler = getattr(loaded.model, "pooler", None) and loaded.whole.pooler
    own = own_head(folder, hf_config, loaded)
    refuse_missing(folder, loaded.report)
    add_generation_config(loaded.model, folder)
    with one_thread():
        survey = survey_attention(loaded.model, encoder=encoder)
        layers = survey.layers(config.block_size)
        if encoder:
            backend: AttentionBackend = encoder_attention(device, dtype)
        else:
            backend = registry.create(config.attention_backend, device, dtype, layers)
    paged = paged_class(hf_config)(loaded.model, survey, backend)
    base = _described(loaded, dtype) if config.adapters else None
    quantized, read_weight = quantize_part(loaded, config)
    install_linears(paged, loaded.model, config, quantized)
    install_mixture(loaded.model, device, dtype)
    with one_thread():
        exchanged = elementwise.install(
            loaded.model, config.elementwise_backend, device, dtype, is_encoder=encoder
        )
    if own is not None or base is not None:
        # Whole on each rank: all of them have the hidden states that they are given.
        paged.heads = make_heads(loaded.model, own)
    if base is not None:
        cut = AdapterCut(loaded.plan, read_weight, dtype)
        heads = describe_heads(paged.heads)
        paged.base = dataclasses.replace(base, is_backbone=not paged.generates, heads=heads)
        outputs = [head.output_name for head in paged.heads.values()]
        paged.lora = lora.install(
            loaded.model, config.lora_backend, device, dtype, whole=loaded.whole, cut=cut,
            outputs=outputs,
        )  # fmt: skip
        paged.lora_backend = paged.lora.backend
    return RankPart(loaded, paged, backend, exchanged)


def meet(part: RankPart, group: RankGroup) -> None:
    """Let a part compute together with the others'."""
    lora_model = part.paged.lora
    if lora_model is None:
        connect(part.loaded.model, part.loaded.plan, group)
    else:
        connect(part.loaded.model, part.loaded.plan, group, lora_model.extra_logits)


@contextmanager
def _reading_part(folder: Path, device: torch.device, seat: tuple[int, int]) -> Iterator[None]:
    """As ``reading``; says of a model that cannot be spread that this is why."""
    try:
        with reading(folder, device):
            yield
    except StartupError as error:
        if isinstance(error.__cause__, CannotSplitError):
            raise StartupError(
                f"--num-shard {seat[1]} is not possible for {folder}: {error.__cause__}",
                ExitCode.MODEL_UNSUPPORTED,
            ) from error
        raise


def _load(
    files: Mapping[str, Any], config: Any, dtype: torch.dtype, seat: tuple[int, int]
) -> LoadedRank:
    loaded = load_rank(
        files,
        config,
        rank=seat[0],
        world_size=seat[1],
        dtype=dtype,
        attention=attention_hook.ATTENTION_NAME,
        backbone=not generates(config),
    )
    relative_positions.plug(loaded.model)
    return loaded


def _described(part: LoadedRank, dtype: torch.dtype) -> BaseDescription:
    """Return the description of the whole model, with the digests that only its weights give."""
    base = describe(part.whole)
    digests: dict[str, str] = {}
    for name in sorted({base.input_embedding, base.output_head} - {""}):
        same = next((each for each in base.tied_with(name) if each in digests), None)
        if same is not None:
            digests[name] = digests[same]
            continue
        weight = part.checkpoint.weight(name)
        if weight is None:
            # Of a tied pair the file may have either.
            others = (part.checkpoint.weight(each) for each in base.tied_with(name))
            weight = next((each for each in others if each is not None), None)
        if weight is not None:
            digests[name] = tensor_digest(weight.to(dtype))
    return dataclasses.replace(base, weight_digests=digests)


def _probe(part: RankPart, config: ShardConfig, device: torch.device, group: RankGroup) -> None:
    """Raise StartupError(MODEL_MISMATCH) unless the ranks compute a miniature as transformers does."""
    backend, encoder = part.backend, part.paged.is_encoder
    dtype = miniature_dtype(backend, device, part.paged.dtype)
    small = miniature.build(part.loaded.whole, device, dtype, num_ranks=group.world_size)
    whole = survey_attention(small, encoder=encoder)
    probe = ModelProbe(small, whole, backend, config.block_size, generates=part.paged.generates)
    probe.record_stock()
    own = _load(in_memory(small), small.config, dtype, (group.rank, group.world_size))
    own.model.to(device)
    survey = survey_attention(own.model, encoder=encoder)
    install_mixture(own.model, device, dtype)
    exchanged = elementwise.install(
        own.model, part.exchanged.backend, device, dtype, is_encoder=encoder
    )
    connect(own.model, own.plan, group)
    probe.check(type(part.paged)(own.model, survey, backend), exchanged)
    if not exchanged.is_active:
        # All ranks see the same logits, and come to the same end.
        part.exchanged.undo()
