"""The normal form of an adapter on disk: one safetensors file and one JSON document.

Reading it takes no PEFT configuration and no patterns, and the tensors stay mapped from the
file. Tensors that modules share are stored once and are one object again when read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.digest import TENSOR_PARTS, content_digest
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import TextFile, TextFiles

DOCUMENT_FILE = "adapter.json"
TENSORS_FILE = "adapter.safetensors"
_FORMAT = 1
# PEFT keeps these in float32 whatever the model computes in; the others take its type.
_LOW_RANK_PARTS = ("a", "b", "magnitude")
_MODEL_PARTS = ("bias", "weight", "token_rows")


def write_normal(adapter: HostAdapter, folder: Path, *, text: TextFiles | None = None) -> None:
    """Write an adapter's normal form into an existing folder.

    ``text`` lists the tokenizer and template files that its digest covers.
    """
    names, tensors = _name_tensors(adapter)
    save_file(tensors, folder / TENSORS_FILE)
    modules = {
        module: {"scaling": delta.scaling, "tensors": names[module]}
        for module, delta in adapter.modules.items()
    }
    document = {
        "format": _FORMAT,
        "digest": adapter.digest,
        "vocab_size": adapter.vocab_size,
        "traits": sorted(adapter.traits),
        "modules": modules,
        "text": [dataclasses.asdict(file) for file in (text or TextFiles()).files],
    }
    # Last: a folder with a document is complete.
    (folder / DOCUMENT_FILE).write_text(json.dumps(document), encoding="utf-8")


def _name_tensors(
    adapter: HostAdapter,
) -> tuple[dict[str, dict[str, str]], dict[str, torch.Tensor]]:
    """Return the tensors' names by module and part, and the tensors by name."""
    names: dict[str, dict[str, str]] = {}
    tensors: dict[str, torch.Tensor] = {}
    known: dict[int, str] = {}
    for module, delta in adapter.modules.items():
        names[module] = {}
        for part in TENSOR_PARTS:
            tensor: torch.Tensor | None = getattr(delta, part)
            if tensor is None:
                continue
            name = known.setdefault(id(tensor), f"{module}/{part}")
            names[module][part] = name
            if name not in tensors:
                # save_file refuses views of one storage; a copy of ours is none.
                tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return names, tensors


def read_normal(
    folder: Path, *, dtype: torch.dtype, low_rank_dtype: torch.dtype = torch.float32
) -> HostAdapter:
    """Return the adapter of a normal form, cast as PEFT does for a model that computes in dtype.

    PEFT computes the low-rank part in float32 whatever the model computes in; give
    ``low_rank_dtype`` to trade that for memory.
    """
    document, tensors = _read(folder)
    return cast(_adapter(document, tensors), dtype=dtype, low_rank_dtype=low_rank_dtype)


def cast(
    adapter: HostAdapter, *, dtype: torch.dtype, low_rank_dtype: torch.dtype = torch.float32
) -> HostAdapter:
    """Return the adapter with the types in which PEFT holds it beside a model of ``dtype``.

    Tensors that have their type already are the same objects as before.
    """
    wanted = dict.fromkeys(_LOW_RANK_PARTS, low_rank_dtype) | dict.fromkeys(_MODEL_PARTS, dtype)
    done: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def converted(delta: ModuleDelta) -> ModuleDelta:
        changes: dict[str, Any] = {}
        for part, target in wanted.items():
            tensor: torch.Tensor | None = getattr(delta, part)
            if tensor is not None:
                # Shared tensors stay shared.
                changes[part] = done.setdefault((id(tensor), target), tensor.to(target))
        return dataclasses.replace(delta, **changes)

    modules = {name: converted(delta) for name, delta in adapter.modules.items()}
    return dataclasses.replace(adapter, modules=modules)


def digest_of(folder: Path) -> str:
    """Return the digest of the content of a normal form, computed anew from its files."""
    document, tensors = _read(folder)
    files = tuple(TextFile(**file) for file in document["text"])
    return content_digest(_adapter(document, tensors), TextFiles(files=files))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        document = json.loads((folder / DOCUMENT_FILE).read_bytes())
        if document["format"] != _FORMAT:
            raise AdapterRefusedError(f"{DOCUMENT_FILE} has a format of another release")
        with safe_open(folder / TENSORS_FILE, framework="pt") as file:
            return document, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterRefusedError(f"the stored adapter is damaged: {error}") from error


def _adapter(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> HostAdapter:
    try:
        modules = {
            name: _delta(entry["scaling"], entry["tensors"], tensors)
            for name, entry in document["modules"].items()
        }
        return HostAdapter(
            digest=document["digest"],
            modules=modules,
            vocab_size=document["vocab_size"],
            traits=frozenset(document["traits"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterRefusedError(f"the stored adapter is damaged: {error!r}") from error


def _delta(
    scaling: float, names: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> ModuleDelta:
    # Unknown parts raise, like missing tensors: nothing of an adapter is dropped silently.
    return ModuleDelta(scaling=scaling, **{part: tensors[name] for part, name in names.items()})
