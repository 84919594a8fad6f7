"""Files of safetensors: written one tensor at a time, and read piece by piece to where bytes shall lie.

So tensors that are views cost no memory when they are written, and nothing is mapped when they are read:
a mapping takes a fault for each few pages, and what lies in it is copied once more.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from lorax_shard.giving_way import PIECE_BYTES, rest
from lorax_shard.hashing import bytes_of

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# The tensors begin at a multiple of this.
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of floats, however they lie in memory; one of them is copied at a time."""
    # Those of larger elements first: each begins where its type wants it then.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in ordered:
            data = bytes_of(tensor)
            for start in range(0, len(data), PIECE_BYTES):
                file.write(data[start : start + PIECE_BYTES])
                rest()


def num_elements(shape: tuple[int, ...]) -> int:
    """Return how many a shape has; raises ValueError or TypeError for what is none."""
    if any(size < 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    return math.prod(shape)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """A file that was verified once, and may be damaged since: whoever reads it compares digests.

    Its calls raise ValueError, KeyError or TypeError for what is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._header, self._start = self._head()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def find(self, name: str) -> StoredTensor:
        """Return where a tensor lies."""
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        stored = StoredTensor(dtype, shape, self._start + begin, end - begin)
        if num_elements(shape) * dtype.itemsize != stored.nbytes:
            raise ValueError(f"{name} has another size than its shape")
        if begin < 0 or stored.start + stored.nbytes > self._size:
            raise ValueError(f"{name} does not lie in the file")
        return stored

    def read(self, start: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes from ``start`` on."""
        while target:
            count = os.preadv(self._file.fileno(), [target], start)
            if count == 0:
                raise ValueError("the file ends too early")
            start, target = start + count, target[count:]

    def _head(self) -> tuple[dict[str, Any], int]:
        length = bytearray(8)
        self.read(0, memoryview(length))
        start = len(length) + int.from_bytes(length, "little")
        if start > self._size:
            raise ValueError("the file ends too early")
        text = bytearray(start - len(length))
        self.read(len(length), memoryview(text))
        return json.loads(text), start
