"""What the process that fetches adapters calls: read one, say what it is, normalise it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorax_shard.lora.delta import HostAdapter
from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.digest import TENSOR_PARTS
from lorax_shard.peft.files import AdapterLimits
from lorax_shard.peft.normal import write_normal
from lorax_shard.peft.read import Examined, examine


def verify(
    folder: Path,
    target: Path,  # noqa: ARG001 — nothing is derived
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the facts of the adapter in ``folder``, as JSON has them; changes nothing.

    ``context`` is what ``make_context`` returns. Raises AdapterRefusedError.
    """
    base, limits = _read_context(context)
    return facts_of(examine(folder, base, limits), base)


def normalise(folder: Path, target: Path, context: Mapping[str, Any]) -> dict[str, Any]:
    """Write the normal form of the adapter in ``folder`` below ``target``; return its facts.

    It lies in a folder named after its digest, which is there as a whole or not at all.
    """
    base, limits = _read_context(context)
    examined = examine(folder, base, limits)
    final = target / examined.adapter.digest
    if not final.is_dir():
        builder = target / f".{uuid.uuid4().hex}"
        builder.mkdir(parents=True)
        try:
            write_normal(examined.adapter, builder, text=examined.text)
            _publish(builder, final)
        finally:
            shutil.rmtree(builder, ignore_errors=True)
    return facts_of(examined, base)


def _publish(builder: Path, final: Path) -> None:
    try:
        builder.rename(final)
    except OSError:
        # Somebody else was faster: the name says that theirs is the same.
        if not final.is_dir():
            raise


def make_context(base: BaseDescription, limits: AdapterLimits) -> dict[str, Any]:
    """Return what ``verify`` must be told, as JSON has it."""
    return {"base": base.to_json(), "limits": json.dumps(dataclasses.asdict(limits))}


def _read_context(context: Mapping[str, Any]) -> tuple[BaseDescription, AdapterLimits]:
    return BaseDescription.from_json(context["base"]), AdapterLimits(
        **json.loads(context["limits"])
    )


def _tensors(adapter: HostAdapter) -> list[torch.Tensor]:
    parts = (getattr(delta, name) for delta in adapter.modules.values() for name in TENSOR_PARTS)
    return list({part.data_ptr(): part for part in parts if part is not None}.values())


def facts_of(examined: Examined, base: BaseDescription) -> dict[str, Any]:
    """Return what the router and the shard want to know of an adapter before they load it."""
    adapter, text = examined.adapter, examined.text
    itemsize = getattr(torch, base.dtype).itemsize
    return {
        "content_digest": adapter.digest,
        "nbytes": adapter.nbytes,
        # In the model's type; tensors that modules share are counted once.
        "device_bytes": sum(tensor.numel() for tensor in _tensors(adapter)) * itemsize,
        "num_modules": len(adapter.modules),
        "max_rank": max((delta.rank for delta in adapter.modules.values()), default=0),
        # Rows of its vocabulary where it adds tokens; 0: the base's.
        "vocab_size": adapter.vocab_size,
        # One more than the highest id of its own tokenizer; 0: the base's tokenizer.
        "num_tokens": text.num_tokens,
        "has_chat_template": text.has_chat_template,
        "text_files": [file.name for file in text.files],
        "traits": sorted(adapter.traits),
    }
