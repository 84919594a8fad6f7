"""Quantizes the linears of a loaded model, as ``--quantize`` asks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorax_contract.config import Quantize, ShardConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard import linear
from lorax_shard.gguf_files import BLOCKS_FILE, blocks_folder
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
from lorax_shard.linear.quantized.gguf_blocks import decode
from lorax_shard.linear.quantized.install import install_quantized, quantize, quantize_each
from lorax_shard.linear.quantized.kernel import load_quantized
from lorax_shard.linear.targets import LinearTarget, find_targets
from lorax_shard.mixture.narrow import round_experts
from lorax_shard.model.hf_model import HFPagedModel

logger = logging.getLogger(__name__)

# What rounds each row, or each number, for itself.
MAKERS: dict[Quantize, Callable[[torch.Tensor], QuantizedWeight]] = {
    "int8": to_int8,
    "bfloat16": to_bfloat16,
}


def store_narrowly(config: ShardConfig) -> ShardConfig:
    """Return what ``--dtype bfloat16`` is on a CPU: weights of linears in it, all else in float32.

    Such weights take half the bytes and the kernels' time; whole layers in bfloat16 take longer
    than in float32. Where the kernel cannot run, or another one is asked for, they are as they are.
    Beside fp8 and int4 rows are bfloat16, whatever the model was saved in.
    """
    if config.quantize in ("fp8", "int4") and config.dtype == "auto":
        return dataclasses.replace(config, dtype="bfloat16")
    if (
        config.device != "cpu"
        or config.dtype != "bfloat16"
        or (config.quantize, config.linear_backend) != ("none", "auto")
        or load_quantized()[0] is None
    ):
        return config
    logger.info("weights of linears are stored in bfloat16; the rest is computed in float32")
    return dataclasses.replace(config, dtype="float32", quantize="bfloat16")


def quantize_model(model: Any, config: ShardConfig) -> dict[str, QuantizedWeight]:
    """Return the quantized weights; their numbers take the place of the model's own.

    So the load-time probe, and whoever reads weights later, sees the model that is served.
    """
    if config.quantize == "none":
        return {}
    if config.quantize == "gguf":
        return read_blocks(model, Path(config.model_dir))
    if config.quantize == "bfloat16":
        round_experts(model, torch.bfloat16)
    maker = MAKERS.get(config.quantize)
    if maker is not None:
        return quantize(model, maker)
    return quantize_each(
        model,
        lambda target: (
            None if is_head(model, target) else for_device(target.weight, config.quantize)
        ),
    )


def is_head(model: Any, target: LinearTarget) -> bool:
    """Return whether a linear computes the logits: fp8 and int4 leave it, and with it the embedding."""
    return getattr(target.parent, target.name) is model.get_output_embeddings()


def for_device(
    weight: torch.Tensor, name: Quantize, largest: torch.Tensor | None = None
) -> QuantizedWeight | None:
    """Return a weight (out x in) as GPUs compute with it; None where they take no such shape.

    ``largest``: what is largest in each whole row, where this is a part of their inputs.
    """
    if name == "int4":
        return to_int4(weight) if fits(INT4, weight.shape) else None
    return to_fp8(weight, largest) if fits(FP8, weight.shape) else None


def _all_rows(view: Any, _place: str, _type_name: str) -> torch.Tensor:
    whole: torch.Tensor = view[:]
    return whole


def read_blocks(
    model: Any, folder: Path, read: Callable[[Any, str, str], torch.Tensor] = _all_rows
) -> dict[str, QuantizedWeight]:
    """Return the weights of the linears that the model's GGUF file holds as blocks.

    ``read`` takes what the model has of a linear's rows of blocks (out x bytes): it is given them
    unread, the linear's place and the type of the blocks.
    """
    path = blocks_folder(folder) / BLOCKS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            types = file.metadata()
            linears = {target.path: source_of(model, target) for target in find_targets(model)}
            return {
                place: decode(read(file.get_slice(name), place, types[name]), types[name])
                for place, name in linears.items()
                if name in types
            }
    except (SafetensorError, OSError) as error:
        raise StartupError(
            f"the blocks of the GGUF file cannot be read from {path} ({error}); start again",
            ExitCode.MODEL_CORRUPT,
        ) from error


def source_of(model: Any, target: LinearTarget) -> str:
    """Return the name of the module whose weight a linear has: a tied head's is the embedding's."""
    if not target.is_tied:
        return target.path
    embedding = model.get_input_embeddings()
    return next((name for name, each in model.named_modules() if each is embedding), target.path)


def install_linears(
    paged: HFPagedModel, model: Any, config: ShardConfig, quantized: dict[str, QuantizedWeight]
) -> None:
    """Give the model's linears what they compute with, and count the bytes."""
    if quantized:
        paged.weight_bytes += install_quantized(model, quantized)
        quantized.clear()
    chosen = linear.install(model, config.linear_backend, torch.device(config.device))
    paged.weight_bytes += chosen.copied_bytes
    paged.linear_backend = chosen.backend if config.quantize == "none" else config.quantize
