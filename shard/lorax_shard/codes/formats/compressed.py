"""compressed-tensors: eight bits as they are, or four and eight packed into words of 32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lorax_shard.codes.formats.fp4 import four_bits
from lorax_shard.codes.formats.scaled import FLOATS, scaled
from lorax_shard.codes.grid import GridWeight, Groups, groups_of
from lorax_shard.codes.matrices import Matrix, Numbers, Words
from lorax_shard.codes.tensors import CodedTensor, CodesError, Files, dtype_of

_READ = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "dense",
)  # fmt: skip
_PACKED = ".weight_packed"


def refuse_compressed(options: Mapping[str, Any]) -> str | None:
    """Return why a configuration asks for something that is not read, or None."""
    groups = list(_weights(options))
    formats = {str(options.get("format")), *(form for form, _ in groups if form)}
    formats -= {"None", "mixed-precision"}
    if unknown := sorted(formats - set(_READ)):
        return f"its format is {unknown[0]}; {', '.join(_READ[:-1])} are read"
    if wrong := [each for _, each in groups if each.get("num_bits") not in (4, 8)]:
        return f"its weights have {wrong[0].get('num_bits')} bits; 4 and 8 are read"
    sparsity = options.get("sparsity_config")
    if isinstance(sparsity, Mapping) and str(sparsity.get("format", "dense")) != "dense":
        return f"its weights are sparse ({sparsity['format']})"
    if options.get("transform_config"):
        return "its activations are transformed (transform_config)"
    return None


def read_compressed(files: Files, options: Mapping[str, Any]) -> dict[str, CodedTensor]:
    """Return the weights that are codes, by their names in the model."""
    groups = [weights for _, weights in _weights(options)]
    block = next((each["block_structure"] for each in groups if each.get("block_structure")), None)
    found: dict[str, CodedTensor] = {}
    for key in files:
        if key.endswith(_PACKED):
            read = four_bits if dtype_of(files, key) == "U8" else _packed
            found[f"{key.removesuffix(_PACKED)}.weight"] = read(files, key)
        elif key.endswith(".weight") and dtype_of(files, key) in (*FLOATS, "I8"):
            found[key] = scaled(files, key, block)
    return found


def _weights(options: Mapping[str, Any]) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    """Yield the format and what is said of the weights of each group of modules."""
    groups = options.get("config_groups")
    for each in groups.values() if isinstance(groups, Mapping) else ():
        weights = each.get("weights")
        if isinstance(weights, Mapping):
            yield each.get("format"), weights


def _packed(files: Files, key: str) -> CodedTensor:
    stem = key.removesuffix("_packed")
    shape_key = f"{stem}_shape"
    if shape_key not in files:
        raise CodesError(f"{key} has no {shape_key} beside it, which says how many inputs it has")
    num_out, num_in = (int(size) for size in files[shape_key].get_tensor(shape_key))
    num_words = files[key].get_slice(key).get_shape()[1]
    bits = 4 if num_words == -(-num_in // 8) else 8
    codes = Words(files, key, 1, bits, size=num_in)
    scales = Numbers(files, f"{stem}_scale")
    rows = groups_of(scales.key, num_out, scales.shape[0], None)
    columns, beside = _columns(files, stem, num_in, scales)
    # Codes are whole numbers with signs, half of the range added.
    zeros: Matrix | float = float(1 << (bits - 1))
    if (zero := f"{stem}_zero_point") in files:
        if dtype_of(files, zero) != "I32":
            raise CodesError(f"{zero} is stored as {dtype_of(files, zero)} beside packed codes")
        # So have they: the halves cancel.
        zeros = Words(files, zero, 0, bits, size=scales.shape[0])
    return GridWeight(codes, scales, (rows, columns), zeros=zeros, beside=(shape_key, *beside))


def _columns(
    files: Files, stem: str, num_in: int, scales: Numbers
) -> tuple[Groups, tuple[str, ...]]:
    """Return how inputs share scales, and what says so beside their number."""
    key = f"{stem}_g_idx"
    groups = groups_of(scales.key, num_in, scales.shape[1], None)
    if key not in files:
        return groups, ()
    places: torch.Tensor = files[key].get_tensor(key)
    # Numbers below zero: nobody has filled it.
    return (Groups(None, places) if int(places.min()) >= 0 else groups), (key,)
