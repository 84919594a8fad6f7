"""GPTQ: codes packed along the inputs, groups of which share a scale and a zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorax_shard.codes.grid import GridWeight, Groups, groups_of
from lorax_shard.codes.matrices import Numbers, Words
from lorax_shard.codes.tensors import CodedTensor, Files, shape_of

_CODES = ".qweight"
_BITS = (2, 4, 8)


def refuse_gptq(options: Mapping[str, Any]) -> str | None:
    """Return why a configuration asks for something that is not read, or None."""
    form = _format(options)
    if form not in ("gptq", "gptq_v2") or options.get("is_marlin_format"):
        return f"its codes lie in the order of {'marlin' if form == 'gptq' else form}; that of gptq and gptq_v2 is read"
    bits = options.get("bits", 4)
    if bits not in _BITS:
        return f"its codes have {bits} bits; {', '.join(map(str, _BITS))} are read"
    return None


def read_gptq(files: Files, options: Mapping[str, Any]) -> dict[str, CodedTensor]:
    """Return the weights that are codes, by their names in the model."""
    return {
        f"{key.removesuffix(_CODES)}.weight": _weight(files, key, options)
        for key in files
        if key.endswith(_CODES)
    }


def _format(options: Mapping[str, Any]) -> str:
    return str(options.get("checkpoint_format") or options.get("format") or "gptq").lower()


def _weight(files: Files, key: str, options: Mapping[str, Any]) -> CodedTensor:
    stem = key.removesuffix("qweight")
    index, scales = f"{stem}g_idx", Numbers(files, f"{stem}scales")
    bits = int(options.get("bits", 4))
    places: torch.Tensor | None = None
    if index in files:
        places = files[index].get_tensor(index)
        # Some modules may have more bits than others: that is how many inputs a word has.
        bits = 32 * shape_of(files, key)[0] // len(places)
    codes = Words(files, key, 0, bits)
    if places is None:
        size = int(options.get("group_size", -1))
        rows = groups_of(scales.key, codes.shape[0], scales.shape[0], size if size > 0 else None)
    else:
        rows = Groups(None, places)
    zeros = Words(files, f"{stem}qzeros", 1, bits, size=scales.shape[1])
    return GridWeight(
        codes,
        scales,
        (rows, Groups(1)),
        zeros=zeros if _format(options) == "gptq_v2" else _OneMore(zeros),
        is_transposed=True,
        beside=() if places is None else (index,),
    )


class _OneMore:
    """Implements Matrix: zeros that were stored less one; the largest code stands for one more."""

    def __init__(self, zeros: Words) -> None:
        self._zeros = zeros
        self.shape, self.key = zeros.shape, zeros.key

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        return self._zeros.read(rows, columns) + 1
