"""Tensors of safetensors files, of which only a part is read when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lorax_shard.parallel.partition import Span

_INDEX_FILE = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
# What checkpoints call a module that transformers calls otherwise (GPT-NeoX's head).
OLD_NAMES = {"embed_out": "lm_head"}
# As safetensors names them.
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class RankSlice:
    """One tensor of a file; indexing it reads the rank's part and nothing else.

    ``spans`` are what the rank has along ``dim``, put together in their order; ``dim`` None:
    the whole tensor. Stands for a tensor in a state dict that transformers loads.
    """

    def __init__(
        self, file: Any, key: str, dim: int | None = None, spans: Sequence[Span] = ()
    ) -> None:
        self._file = file
        self._key = key
        self._dim = dim
        self._spans = spans

    def __getitem__(self, index: object) -> torch.Tensor:
        view = self._file.get_slice(self._key)
        if self._dim is None:
            whole: torch.Tensor = view[:]
            return whole
        before = (slice(None),) * self._dim
        parts = [view[(*before, slice(span.start, span.stop))] for span in self._spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._dim)

    def get_shape(self) -> list[int]:
        """Return the shape of the rank's part."""
        shape: list[int] = list(self._file.get_slice(self._key).get_shape())
        if self._dim is not None:
            shape[self._dim] = sum(map(len, self._spans))
        return shape

    def get_dtype(self) -> str:
        """Return the type as safetensors names it."""
        dtype: str = self._file.get_slice(self._key).get_dtype()
        return dtype


class Checkpoint:
    """The tensors of a model, none of them read before it is asked for.

    Args:
        files: the open file of each tensor, see ``open_files`` and ``in_memory``.
        prefix: of the base model below its head; older checkpoints leave it out of their names.
        around: what those of a model around this one begin with.
    """

    def __init__(self, files: Mapping[str, Any], prefix: str, around: str = "") -> None:
        self.files = files
        self._prefix, self._around = prefix, around

    def weight(self, module: str) -> torch.Tensor | None:
        """Read the whole weight of a module; None if there is none under its name."""
        key = f"{module}.weight"
        old = (f"{name}.weight" for name, new in OLD_NAMES.items() if new == module)
        inner = key.removeprefix(f"{self._prefix}.")
        for name in (key, inner, f"{self._around}.{key}", *old):
            if name in self.files:
                whole: torch.Tensor = self.files[name].get_tensor(name)
                return whole
        return None


def open_files(folder: Path) -> Mapping[str, Any]:
    """Return the open file of each tensor in a model folder."""
    index = folder / _INDEX_FILE
    if not index.is_file():
        file: Any = safe_open(folder / _SINGLE_FILE, framework="pt")
        return dict.fromkeys(file.keys(), file)
    by_key: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = {name: safe_open(folder / name, framework="pt") for name in set(by_key.values())}
    return {key: files[name] for key, name in by_key.items()}


def in_memory(model: nn.Module) -> Mapping[str, Any]:
    """Return what stands for the open files of a model that is in memory as a whole."""
    tensors = model.state_dict()
    return dict.fromkeys(tensors, _Memory(tensors))


class _Memory:
    """Reads as an open file of safetensors does."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def get_slice(self, key: str) -> _View:
        return _View(self._tensors[key])


class _View:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPE_NAMES[self._tensor.dtype]
