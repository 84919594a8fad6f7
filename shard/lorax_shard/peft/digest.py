"""What names an adapter's content: a digest over everything that decides its output.

It covers the tensors, their scaling, the vocabulary, the labels of its head, and the adapter's own tokenizer and
template files. It does not cover where the adapter came from, the name of its base, how it
was trained, or how its options were worded: adapters that compute the same are one.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch

from lorax_shard.hashing import Hash, bytes_of, put
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.files import TextFiles

# The parts of a ModuleDelta that are tensors, in the order in which they are hashed.
TENSOR_PARTS = ("a", "b", "b_bias", "magnitude", "bias", "weight", "token_ids", "token_rows")
# A change of what is hashed changes this, so that old digests never name new content.
_VERSION = "lorax-adapter-1"


def digest_adapter(adapter: HostAdapter, text: TextFiles | None = None) -> HostAdapter:
    """Return the adapter with the digest of its content."""
    return dataclasses.replace(adapter, digest=content_digest(adapter, text or TextFiles()))


def content_digest(adapter: HostAdapter, text: TextFiles) -> str:
    """Return the digest of an adapter's content, as hexadecimal digits."""
    hashed = hashlib.sha256()
    put(hashed, _VERSION, str(adapter.vocab_size), *sorted(adapter.traits))
    if adapter.head:
        put(hashed, "head", adapter.head)
    if adapter.head_facts is not None:
        facts = adapter.head_facts
        put(hashed, "labels", str(int(facts.pooling)), str(int(facts.scores)), *facts.labels)
    if adapter.invocation_ids:
        put(hashed, "invocation", *map(str, adapter.invocation_ids))
    for name in sorted(adapter.modules):
        _put_delta(hashed, name, adapter.modules[name])
    for file in sorted(text.files, key=lambda file: file.name):
        put(hashed, "file", file.name, file.sha256)
    return hashed.hexdigest()


def _put_delta(hashed: Hash, name: str, delta: ModuleDelta) -> None:
    put(hashed, "module", name, float(delta.scaling).hex())
    for part in TENSOR_PARTS:
        tensor: torch.Tensor | None = getattr(delta, part)
        if tensor is not None:
            put(hashed, part, str(tensor.dtype), str(tuple(tensor.shape)))
            hashed.update(bytes_of(tensor))
