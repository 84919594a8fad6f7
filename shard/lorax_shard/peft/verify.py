"""What the process that fetches adapters calls: read one, say what it is, normalise it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.context import base_tokenizer, read_context
from lorax_shard.peft.digest import TENSOR_PARTS
from lorax_shard.peft.matching import select_in_time
from lorax_shard.peft.normal import facts_document, write_normal
from lorax_shard.peft.read import Examined, examine
from lorax_shard.peft.tokenizer import read_tokenizer
from lorax_shard.vocabulary import write_vocabulary

# What keeps the types of its low-rank matrices.
_KEEPING = ("linear", "router", "experts")


def verify(folder: Path, target: Path, context: Mapping[str, Any]) -> dict[str, Any]:
    """Write the normal form of the adapter in ``folder`` into ``target``; return its facts.

    The facts are as JSON has them. ``context`` is what ``make_context`` returns. Raises
    AdapterRefusedError.
    """
    base, limits, model_id = read_context(context)
    examined = examine(folder, base, limits, select=select_in_time, model_id=model_id)
    num_rows = examined.adapter.vocab_size or base.vocab_size
    tokenizer = read_tokenizer(folder, base_tokenizer(context), num_rows)
    write_normal(examined.adapter, target, text=examined.text, source=examined.tensors)
    if tokenizer is not None:
        write_vocabulary(tokenizer.vocabulary, target)
    is_base = tokenizer is not None and tokenizer.is_base
    return {**facts_of(examined, base), "is_bases_tokenizer": is_base}


def prepare(context: Mapping[str, Any]) -> None:
    """Read what is the same for every adapter."""
    read_context(context)


def _tensors(adapter: HostAdapter) -> list[torch.Tensor]:
    parts = (getattr(delta, name) for delta in adapter.modules.values() for name in TENSOR_PARTS)
    return list({part.data_ptr(): part for part in parts if part is not None}.values())


def _device_bytes(adapter: HostAdapter, base: BaseDescription) -> int:
    """Return what an adapter takes where steps compute; tensors that modules share count once.

    All is in the model's type, but for low-rank matrices of linears, routers and experts where they
    keep theirs.
    """
    itemsize = getattr(torch, base.dtype).itemsize
    linears = {name for name, info in base.modules.items() if info.kind in _KEEPING}
    kept = {
        part.data_ptr()
        for name, delta in adapter.modules.items()
        if base.keeps_stored and name in linears
        # B takes DoRA's factors.
        for part in ((delta.a, delta.b) if delta.magnitude is None else (delta.a,))
        if part is not None
    }
    return sum(
        tensor.nbytes if tensor.data_ptr() in kept else tensor.numel() * itemsize
        for tensor in _tensors(adapter)
    )


def facts_of(examined: Examined, base: BaseDescription) -> dict[str, Any]:
    """Return what the router and the shard want to know of an adapter before they load it."""
    adapter, text = examined.adapter, examined.text
    head = adapter.head_facts
    return {
        "content_digest": adapter.digest,
        # The name of its normal form in its folder.
        "derived": adapter.digest,
        "nbytes": adapter.nbytes,
        "device_bytes": _device_bytes(adapter, base),
        "num_modules": len(adapter.modules),
        "max_rank": max((delta.rank for delta in adapter.modules.values()), default=0),
        # Rows of its vocabulary where it adds tokens; 0: the base's.
        "vocab_size": adapter.vocab_size,
        # One more than the highest id of its own tokenizer; 0: the base's tokenizer.
        "num_tokens": text.num_tokens,
        "has_chat_template": text.has_chat_template,
        "text_files": [file.name for file in text.files],
        "traits": sorted(adapter.traits),
        "invocation_ids": list(adapter.invocation_ids),
        "head": None if head is None else facts_document(head),
        "warnings": list(examined.warnings),
    }
