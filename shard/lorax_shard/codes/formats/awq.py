"""AWQ: codes of four bits packed along the outputs, in an order of their own within a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorax_shard.codes.grid import GridWeight, Groups, groups_of
from lorax_shard.codes.matrices import Numbers, Words
from lorax_shard.codes.tensors import CodedTensor, Files

_CODES = ".qweight"
_BITS = 4
# Where each of eight neighbours lies in its word.
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def refuse_awq(options: Mapping[str, Any]) -> str | None:
    """Return why a configuration asks for something that is not read, or None."""
    version = str(options.get("version") or options.get("format") or "gemm").lower()
    if version != "gemm":
        return f"its codes lie in the order of {version}; that of gemm is read"
    bits = options.get("bits", options.get("w_bit", _BITS))
    return None if bits == _BITS else f"its codes have {bits} bits; 4 are read"


def read_awq(files: Files, _options: Mapping[str, Any]) -> dict[str, CodedTensor]:
    """Return the weights that are codes, by their names in the model."""
    return {
        f"{key.removesuffix(_CODES)}.weight": _weight(files, key)
        for key in files
        if key.endswith(_CODES)
    }


def _weight(files: Files, key: str) -> CodedTensor:
    stem = key.removesuffix("qweight")
    codes = Words(files, key, 1, _BITS, order=_ORDER)
    scales = Numbers(files, f"{stem}scales")
    rows = groups_of(scales.key, codes.shape[0], scales.shape[0], None)
    zeros = Words(files, f"{stem}qzeros", 1, _BITS, order=_ORDER)
    return GridWeight(codes, scales, (rows, Groups(1)), zeros=zeros, is_transposed=True)
