"""MXFP4: experts in four bits, 32 inputs of which share a power of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorax_shard.codes.formats.fp4 import BIAS, unpacked
from lorax_shard.codes.tensors import CodedTensor, CodesError, Files, shape_of

_CODES, _SCALES = "_blocks", "_scales"
_GROUP = 32


def read_mxfp4(files: Files, _options: Mapping[str, Any]) -> dict[str, CodedTensor]:
    """Return the experts that are codes, by their names in the model."""
    return {
        key.removesuffix(_CODES): ExpertsInFourBits(files, key)
        for key in files
        if key.endswith(_CODES)
    }


class ExpertsInFourBits:
    """Implements CodedTensor: experts x in x out, of codes that lie experts x out x groups x bytes."""

    def __init__(self, files: Files, key: str) -> None:
        scale_key = f"{key.removesuffix(_CODES)}{_SCALES}"
        stored, scales = shape_of(files, key), shape_of(files, scale_key)
        if len(stored) != 4 or stored[:3] != scales or stored[3] * 2 != _GROUP:
            raise CodesError(f"{key} of shape {list(stored)} does not fit scales of {list(scales)}")
        self.keys = (key, scale_key)
        self._files = files
        self.shape: tuple[int, ...] = (stored[0], stored[2] * _GROUP, stored[1])

    def read(self, spans: tuple[slice, ...]) -> torch.Tensor:
        """Return a part of the numbers in float32."""
        experts, inputs, outputs = spans
        groups = slice(inputs.start // _GROUP, -(-inputs.stop // _GROUP))
        code_key, scale_key = self.keys
        packed = self._files[code_key].get_slice(code_key)[experts, outputs, groups]
        powers = self._files[scale_key].get_slice(scale_key)[experts, outputs, groups]
        exponents = (powers.to(torch.int32) - BIAS).unsqueeze(-1)
        numbers = torch.ldexp(unpacked(packed), exponents).flatten(2)
        start = inputs.start - groups.start * _GROUP
        return numbers.narrow(2, start, inputs.stop - inputs.start).transpose(1, 2).contiguous()
