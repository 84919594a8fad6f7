"""What names an adapter's content: a digest over everything that decides its output.

It covers the tensors, their scaling, the vocabulary, the labels of its head, and the adapter's own tokenizer and
template files. It does not cover where the adapter came from, the name of its base, how it
was trained, or how its options were worded: adapters that compute the same are one.

Factors of experts are hashed as they lie in memory, with the order in which they do: gigabytes
that nobody turns over for that.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch

from lorax_shard.hashing import bytes_of, put, take
from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.files import TextFiles

# The parts of a ModuleDelta that are tensors, in the order in which they are hashed.
TENSOR_PARTS = ("a", "b", "b_bias", "magnitude", "bias", "weight", "token_ids", "token_rows")
# A change of what is hashed changes this, so that old digests never name new content.
_VERSION = "lorax-adapter-1"
# Of the normal form. It lies by its digest beside the files that it was made of, where those of
# other releases lie, too: so a digest covers it.
FORMAT = 4
_EXPERTS_DIM = 3

# The dimensions of a tensor, the one with the largest steps in memory first.
Order = tuple[int, ...]


class ContentDigest:
    """The digest of an adapter in the making: of its modules, by name, and of their parts in turn.

    ``hashed`` takes in the values of each part after ``begin_part``.
    """

    def __init__(self, adapter: HostAdapter) -> None:
        """Begin with what is said of the adapter as a whole; its modules are not looked at."""
        self.hashed = hashlib.sha256()
        put(self.hashed, f"{_VERSION}.{FORMAT}", str(adapter.vocab_size), *sorted(adapter.traits))
        if adapter.head:
            put(self.hashed, "head", adapter.head)
        if adapter.head_facts is not None:
            facts = adapter.head_facts
            scores = (str(int(facts.pooling)), str(int(facts.scores)))
            put(self.hashed, "labels", *scores, *facts.labels)
        if adapter.invocation_ids:
            put(self.hashed, "invocation", *map(str, adapter.invocation_ids))

    def begin_module(self, name: str, scaling: float) -> None:
        """Go on with another module."""
        put(self.hashed, "module", name, float(scaling).hex())

    def begin_part(
        self, part: str, dtype: torch.dtype, shape: Sequence[int], order: Order | None
    ) -> None:
        """Go on with another part of the module: of what type and shape it is, and how it lies."""
        put(self.hashed, part, str(dtype), str(tuple(shape)))
        if order is not None:
            put(self.hashed, "order", str(order))

    def end(self, text: TextFiles) -> str:
        """Return the digest, as hexadecimal digits."""
        for file in sorted(text.files, key=lambda file: file.name):
            put(self.hashed, "file", file.name, file.sha256)
        return self.hashed.hexdigest()


def digest_adapter(adapter: HostAdapter, text: TextFiles | None = None) -> HostAdapter:
    """Return the adapter with the digest of its content."""
    return dataclasses.replace(adapter, digest=content_digest(adapter, text or TextFiles()))


def content_digest(adapter: HostAdapter, text: TextFiles) -> str:
    """Return the digest of an adapter's content, as hexadecimal digits."""
    digest = ContentDigest(adapter)
    for name in sorted(adapter.modules):
        delta = adapter.modules[name]
        digest.begin_module(name, delta.scaling)
        for part in TENSOR_PARTS:
            tensor: torch.Tensor | None = getattr(delta, part)
            if tensor is not None:
                order = order_of(tensor)
                digest.begin_part(part, tensor.dtype, tensor.shape, order)
                take(digest.hashed, bytes_of(in_order(tensor, order)))
    return digest.end(text)


def order_of(tensor: torch.Tensor) -> Order | None:
    """Return how the factors of all experts lie in memory, without gaps; None: row by row, or so read."""
    if tensor.dim() != _EXPERTS_DIM or tensor.is_contiguous():
        return None
    steps = tensor.stride()
    order = tuple(sorted(range(_EXPERTS_DIM), key=lambda dim: (-steps[dim], dim)))
    return order if tensor.permute(order).is_contiguous() else None


def in_order(tensor: torch.Tensor, order: Order | None) -> torch.Tensor:
    """Return a tensor with its dimensions in the order in which they lie in memory."""
    return tensor if order is None else tensor.permute(order)
