"""Weights of eight bits beside their scales: FP8 of several makers, and whole numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lorax_shard.codes.formats.fp4 import four_bits
from lorax_shard.codes.grid import GridWeight, groups_of
from lorax_shard.codes.matrices import Numbers
from lorax_shard.codes.tensors import CodedTensor, CodesError, Files, dtype_of

FLOATS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("weight_scale_inv", "weight_scale")


def read_fp8(files: Files, options: Mapping[str, Any]) -> dict[str, CodedTensor]:
    """Return the weights that are FP8 numbers times scales: of blocks, of rows, or of all of it."""
    block = options.get("weight_block_size")
    return {
        key: scaled(files, key, block)
        for key in files
        if key.endswith(".weight") and dtype_of(files, key) in FLOATS
    }


def scaled(files: Files, key: str, block: Sequence[int] | None) -> GridWeight:
    """Return one weight (out x in) with a scale for each block, row, group of inputs, or for all.

    ``block``: rows and columns of a block.
    """
    stem = key.removesuffix("weight")
    name = next((f"{stem}{each}" for each in _SCALES if f"{stem}{each}" in files), None)
    if name is None:
        raise CodesError(f"{key} is stored in eight bits, and the files have no scale for it")
    codes, scales = Numbers(files, key), Numbers(files, name)
    sizes = block or (None, None)
    groups = [
        groups_of(name, size, number, own)
        for size, number, own in zip(codes.shape, scales.shape, sizes, strict=True)
    ]
    zero = f"{stem}weight_zero_point"
    has_zeros = zero in files and dtype_of(files, zero) not in FLOATS
    zeros = Numbers(files, zero) if has_zeros else 0.0
    return GridWeight(codes, scales, (groups[0], groups[1]), zeros=zeros)


def read_modelopt(files: Files, options: Mapping[str, Any]) -> dict[str, CodedTensor]:
    """Return the weights that are FP8 or NVFP4 numbers times scales."""
    halves = {
        key: four_bits(files, key)
        for key in files
        if key.endswith(".weight") and dtype_of(files, key) == "U8"
    }
    return {**read_fp8(files, options), **halves}


def refuse_modelopt(options: Mapping[str, Any]) -> str | None:
    """Return why weights of ModelOpt cannot be read, None for FP8 and NVFP4."""
    nested = options.get("quantization")
    algorithm = str((nested if isinstance(nested, Mapping) else options).get("quant_algo")).upper()
    if algorithm in ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4"):
        return None
    return f"its algorithm is {algorithm}, and FP8 and NVFP4 are read"
