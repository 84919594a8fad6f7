"""Tensors that files keep as codes, read as open files of safetensors are: numbers, by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

# By name the open file that has it, as ``parallel.slices.open_files`` returns them.
Files = Mapping[str, Any]


class CodesError(ValueError):
    """Codes that cannot be read; the text names the tensor and what is wrong with it."""


class CodedTensor(Protocol):
    """A tensor of the model, kept as codes and what turns them into numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The tensors of the files that it is made from."""

    def read(self, spans: tuple[slice, ...]) -> torch.Tensor:
        """Return a part of the numbers in float32; a span with both ends for each dimension."""


class CodedFile:
    """Stands for the open file of coded tensors, by the names that the model has for them."""

    def __init__(self, tensors: Mapping[str, CodedTensor]) -> None:
        self._tensors = tensors

    def get_tensor(self, key: str) -> torch.Tensor:
        """Return all numbers of a tensor."""
        return CodedView(self._tensors[key])[:]

    def get_slice(self, key: str) -> CodedView:
        """Return what reads a tensor by part."""
        return CodedView(self._tensors[key])


class CodedView:
    """One coded tensor; indexing it by slices reads and decodes no more than they ask for."""

    def __init__(self, tensor: CodedTensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> torch.Tensor:
        given = index if isinstance(index, tuple) else (index,)
        shape = self._tensor.shape
        given = (*given, *(slice(None),) * (len(shape) - len(given)))
        bounds = [part.indices(size) for part, size in zip(given, shape, strict=True)]
        return self._tensor.read(tuple(slice(start, stop) for start, stop, _ in bounds))

    def get_shape(self) -> list[int]:
        """Return the shape of the numbers."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Return the type of the numbers as safetensors names it."""
        return "F32"


def shape_of(files: Files, key: str) -> tuple[int, ...]:
    """Return the shape of a tensor of the files; CodesError where there is none."""
    if key not in files:
        raise CodesError(f"{key} is not in the files, which have codes that need it")
    return tuple(files[key].get_slice(key).get_shape())


def dtype_of(files: Files, key: str) -> str:
    """Return the type of a tensor of the files as safetensors names it."""
    dtype: str = files[key].get_slice(key).get_dtype()
    return dtype
