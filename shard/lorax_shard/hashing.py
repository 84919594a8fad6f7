"""Digests of tensors and of words beside them."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

from lorax_shard.giving_way import PIECE_BYTES, rest


class Hash(Protocol):
    """A digest in the making."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take more bytes in."""


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the digest of one tensor: its type, shape and values."""
    hashed = hashlib.sha256()
    put(hashed, str(tensor.dtype), str(tuple(tensor.shape)))
    take(hashed, bytes_of(tensor))
    return hashed.hexdigest()


def take(hashed: Hash, data: memoryview) -> None:
    """Take bytes in, piece by piece beside steps."""
    for start in range(0, len(data), PIECE_BYTES):
        hashed.update(data[start : start + PIECE_BYTES])
        rest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the values of a tensor as they lie in memory, row by row."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def put(hashed: Hash, *words: str) -> None:
    """Hash words so that no two lists of words look alike."""
    for word in words:
        data = word.encode()
        hashed.update(len(data).to_bytes(8, "little"))
        hashed.update(data)
