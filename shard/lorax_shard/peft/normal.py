"""The normal form of an adapter on disk: one JSON document, and where its tensors lie.

Written once, by the process that verifies adapters, into a folder of the adapter's own folder;
read by the process that holds the model. Reading it takes no PEFT configuration and no
patterns: the document names a tensor for each part of each module. As a rule these are the
tensors of the adapter's own file, those of experts in another shape and order than there; where reading
had to change values, they are stored beside the document. Tensors that modules share are one object
again when read.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind
from lorax_shard.adapter_files import WEIGHTS_FILE
from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.digest import FORMAT, TENSOR_PARTS, ContentDigest, in_order, order_of
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.files import TextFile, TextFiles, sha256_of
from lorax_shard.peft.stored_parts import IDS, PartsReader, StoredPlace
from lorax_shard.peft.tensor_file import TensorFile, write_tensors

DOCUMENT_FILE = "adapter.json"
TENSORS_FILE = "adapter.safetensors"
# PEFT keeps these in float32 whatever the model computes in; the others take its type.
_LOW_RANK_PARTS = ("a", "b", "b_bias", "magnitude")
_MODEL_PARTS = ("bias", "weight", "token_rows")
_NO_TENSORS: Mapping[str, torch.Tensor] = {}


def write_normal(
    adapter: HostAdapter,
    folder: Path,
    *,
    text: TextFiles | None = None,
    source: Mapping[str, torch.Tensor] = _NO_TENSORS,
) -> None:
    """Write an adapter's normal form into an existing folder.

    ``text`` lists the tokenizer and template files that its digest covers, ``source`` holds the
    tensors of the adapter's own file: if the adapter's are all among them, none is copied.
    """
    parts = {name: _tensors_of(delta) for name, delta in adapter.modules.items()}
    places = _places_in(source, parts)
    is_source = all(id(tensor) in places for tensor in _all(parts))
    if not is_source:
        places = _save(parts, folder / TENSORS_FILE)
    modules = {
        module: {
            "scaling": delta.scaling,
            "tensors": {part: places[id(each)].to_json() for part, each in parts[module].items()},
            **({} if delta.token_ids is None else {IDS: delta.token_ids.tolist()}),
        }
        for module, delta in adapter.modules.items()
    }
    document = {
        "format": FORMAT,
        "digest": adapter.digest,
        "vocab_size": adapter.vocab_size,
        "traits": sorted(adapter.traits),
        "invocation_ids": adapter.invocation_ids,
        "head": adapter.head,
        "head_facts": None if adapter.head_facts is None else facts_document(adapter.head_facts),
        "is_source": is_source,
        "modules": modules,
        "text": [dataclasses.asdict(file) for file in (text or TextFiles()).files],
    }
    (folder / DOCUMENT_FILE).write_text(json.dumps(document), encoding="utf-8")


_Parts = Mapping[str, Mapping[str, torch.Tensor]]


def _tensors_of(delta: ModuleDelta) -> dict[str, torch.Tensor]:
    values = {part: getattr(delta, part) for part in TENSOR_PARTS if part != IDS}
    return {part: tensor for part, tensor in values.items() if tensor is not None}


def _all(parts: _Parts) -> Iterator[torch.Tensor]:
    return (tensor for each in parts.values() for tensor in each.values())


def _places_in(source: Mapping[str, torch.Tensor], parts: _Parts) -> dict[int, StoredPlace]:
    """Return where tensors lie in the adapter's own file, by identity; those of experts as views."""
    places = {id(tensor): StoredPlace(name) for name, tensor in source.items()}
    names = {each.data_ptr(): name for name, each in source.items() if each.numel()}
    for tensor in _all(parts):
        name, order = names.get(tensor.data_ptr()), order_of(tensor)
        lies_so = in_order(tensor, order)
        if id(tensor) in places or name is None or not lies_so.is_contiguous():
            continue
        if (lies_so.dtype, lies_so.numel()) == (source[name].dtype, source[name].numel()):
            places[id(tensor)] = StoredPlace(name, tuple(lies_so.shape), order)
    return places


def _save(parts: _Parts, path: Path) -> dict[int, StoredPlace]:
    """Store each tensor once; return where they lie by identity."""
    places: dict[int, StoredPlace] = {}
    tensors: dict[str, torch.Tensor] = {}
    for module, each in parts.items():
        for part, tensor in each.items():
            if id(tensor) not in places:
                name, order = f"{module}/{part}", order_of(tensor)
                tensors[name] = in_order(tensor, order)
                shape = None if order is None else tuple(tensors[name].shape)
                places[id(tensor)] = StoredPlace(name, shape, order)
    write_tensors(path, tensors)
    return places


def read_normal(folder: Path) -> HostAdapter:
    """Return the adapter of a normal form with the values that are stored, in memory of its own.

    The factors of all experts lie in it as steps read them. The folder lies in the adapter's own. Raises
    AdapterRefusedError unless the content, text files included, is what the document's digest names.
    """
    try:
        document = json.loads((folder / DOCUMENT_FILE).read_bytes())
        if document["format"] != FORMAT:
            raise AdapterRefusedError(f"{DOCUMENT_FILE} has a format of another release")
        adapter, digest = _adapter(document, folder)
        files = tuple(TextFile(**file) for file in document["text"])
        is_whole = digest.end(TextFiles(files=files)) == adapter.digest and all(
            sha256_of(folder.parent / file.name) == file.sha256 for file in files
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        raise AdapterRefusedError(f"the stored adapter is damaged: {error!r}") from error
    if not is_whole:
        raise AdapterRefusedError("the stored adapter is damaged: it is not what was verified")
    return adapter


def _adapter(document: Mapping[str, Any], folder: Path) -> tuple[HostAdapter, ContentDigest]:
    """Return what a document says, with what was read for it hashed."""
    path = folder.parent / WEIGHTS_FILE if document["is_source"] else folder / TENSORS_FILE
    entries: Mapping[str, Mapping[str, Any]] = document["modules"]
    adapter = HostAdapter(
        digest=document["digest"],
        modules={},
        vocab_size=document["vocab_size"],
        traits=frozenset(document["traits"]),
        invocation_ids=tuple(document["invocation_ids"]),
        head=document["head"],
        head_facts=_head_facts(document["head_facts"]),
    )
    digest = ContentDigest(adapter)
    with TensorFile(path) as file:
        reader = PartsReader(file, digest)
        deltas = {name: reader.delta(name, entries[name]) for name in sorted(entries)}
    modules = {name: deltas[name] for name in entries}
    return dataclasses.replace(adapter, modules=modules), digest


def facts_document(facts: HeadFacts) -> dict[str, Any]:
    """Return what a head says, as JSON has it."""
    return {
        "pooling": int(facts.pooling), "labels": list(facts.labels), "scores": int(facts.scores)
    }  # fmt: skip


def _head_facts(document: Mapping[str, Any] | None) -> HeadFacts | None:
    if document is None:
        return None
    return HeadFacts(
        pooling=Pooling(document["pooling"]),
        labels=tuple(document["labels"]),
        scores=ScoreKind(document["scores"]),
    )


def cast(
    adapter: HostAdapter, *, dtype: torch.dtype, low_rank_dtype: torch.dtype | None = torch.float32
) -> HostAdapter:
    """Return the adapter with the types in which PEFT holds it beside a model of ``dtype``.

    PEFT computes the low-rank part in float32 whatever the model computes in; give
    ``low_rank_dtype`` to trade that for memory, None to leave it as it was stored. Tensors that
    have their type already are the same objects as before.
    """
    wanted = dict.fromkeys(_MODEL_PARTS, dtype)
    if low_rank_dtype is not None:
        wanted |= dict.fromkeys(_LOW_RANK_PARTS, low_rank_dtype)
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
