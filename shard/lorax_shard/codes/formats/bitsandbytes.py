"""bitsandbytes: a table of 16 numbers for blocks of a flat matrix, or eight bits for rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from lorax_shard.codes.grid import GridWeight, Groups
from lorax_shard.codes.matrices import Numbers
from lorax_shard.codes.tensors import CodedTensor, CodesError, Files, dtype_of

_STATE = ".quant_state.bitsandbytes__"
# Of a row's largest number, its code in eight bits.
_MOST = 127.0


def read_bitsandbytes(files: Files, _options: Mapping[str, Any]) -> dict[str, CodedTensor]:
    """Return the weights that are codes, by their names in the model."""
    found: dict[str, CodedTensor] = {}
    states = {key.partition(_STATE)[0]: key for key in files if _STATE in key}
    for key in files:
        if not key.endswith(".weight"):
            continue
        if key in states:
            found[key] = FlatTable(files, key, states[key])
        elif dtype_of(files, key) == "I8":
            found[key] = _by_row(files, key)
    return found


def _by_row(files: Files, key: str) -> CodedTensor:
    stem = key.removesuffix("weight")
    if f"{stem}SCB" not in files:
        raise CodesError(f"{key} is stored in eight bits, and the files have no {stem}SCB for it")
    beside = [name for name in (f"{stem}weight_format",) if name in files]
    scales = _RowScales(files, f"{stem}SCB")
    return GridWeight(Numbers(files, key), scales, (Groups(1), Groups(None)), beside=beside)


class _RowScales(Numbers):
    """What is largest in each row, as the scale of its codes."""

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        return super().read(rows, columns) / _MOST


class FlatTable:
    """Implements CodedTensor: places in a table, two in a byte, times the largest of a block.

    A matrix is one row of numbers, cut into blocks. What is largest in them may be codes again.
    """

    def __init__(self, files: Files, key: str, state_key: str) -> None:
        state = json.loads(bytes(files[state_key].get_tensor(state_key).tolist()))
        self._block = int(state["blocksize"])
        shape = tuple(int(size) for size in state["shape"])
        if len(shape) != 2 or self._block % 2 or shape[0] * shape[1] % 2:
            raise CodesError(f"{key} of shape {list(shape)} has blocks of {self._block}")
        self.shape: tuple[int, ...] = shape
        self._file, self._key = files[key], key
        parts = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        own = {part: f"{key}.{part}" for part in parts if f"{key}.{part}" in files}
        values = {part: files[name].get_tensor(name) for part, name in own.items()}
        self.keys = (key, state_key, *own.values())
        # The high half of a byte comes first.
        self._table = values["quant_map"].float()
        self._largest = _largest(values, state)

    def read(self, spans: tuple[slice, ...]) -> torch.Tensor:
        """Return a part of the numbers in float32."""
        rows, columns = spans
        start, stop = (row * self.shape[1] for row in (rows.start, rows.stop))
        first = start // self._block
        last = -(-stop // self._block)
        flat: torch.Tensor = self._file.get_tensor(self._key).flatten()
        packed = flat[first * self._block // 2 : last * self._block // 2]
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()
        blocks = torch.arange(len(codes)) // self._block
        numbers = self._table[codes.long()] * self._largest[first:last][blocks]
        own: torch.Tensor = numbers[start - first * self._block :][: stop - start]
        return own.view(-1, self.shape[1])[:, columns].contiguous()


def _largest(values: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> torch.Tensor:
    stored = values["absmax"]
    if "nested_absmax" not in values:
        return stored.float()
    blocks = torch.arange(len(stored)) // int(state["nested_blocksize"])
    numbers = values["nested_quant_map"].float()[stored.long()]
    return numbers * values["nested_absmax"].float()[blocks] + float(state["nested_offset"])
