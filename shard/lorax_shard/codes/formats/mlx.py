"""MLX: codes packed along the inputs, groups of which share a scale and an offset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorax_shard.codes.grid import GridWeight, Groups, groups_of
from lorax_shard.codes.matrices import Numbers, Words
from lorax_shard.codes.tensors import CodedTensor, Files, dtype_of

_BITS = (2, 4, 8)


def refuse_mlx(options: Mapping[str, Any]) -> str | None:
    """Return why a configuration asks for something that is not read, or None."""
    # Modules may differ from the rest: they have a mapping of their own.
    for each in (options, *(value for value in options.values() if isinstance(value, Mapping))):
        if (mode := each.get("mode", "affine")) != "affine":
            return f"its codes are of mode {mode}; affine ones are read"
        if (bits := each.get("bits", 4)) not in _BITS:
            return f"its codes have {bits} bits; {', '.join(map(str, _BITS))} are read"
    return None


def read_mlx(files: Files, options: Mapping[str, Any]) -> dict[str, CodedTensor]:
    """Return the weights that are codes, by their names in the model."""
    return {
        key: _weight(files, key, options)
        for key in files
        if key.endswith(".weight") and dtype_of(files, key) == "U32"
    }


def _weight(files: Files, key: str, options: Mapping[str, Any]) -> CodedTensor:
    stem = key.removesuffix(".weight")
    own = options.get(stem)
    said = {**options, **own} if isinstance(own, Mapping) else options
    codes = Words(files, key, 1, int(said.get("bits", 4)))
    scales = Numbers(files, f"{stem}.scales")
    group = int(said.get("group_size", 64))
    columns = groups_of(scales.key, codes.shape[1], scales.shape[1], group)
    offsets = Numbers(files, f"{stem}.biases")
    return GridWeight(codes, scales, (Groups(1), columns), offsets=offsets)
