"""Describes a model for whoever reads adapters.

``describe`` is called once, on the model as transformers builds it (a meta device is
enough) and before linears are packed or wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from lorax_shard.hashing import tensor_digest
from lorax_shard.mixture.layout import ExpertsLayout, is_router, layout_of
from lorax_shard.model.heads import Head
from lorax_shard.model.older_names import OlderNames
from lorax_shard.peft.base import BaseDescription, HeadDescription, Kind, ModuleInfo

# Kinds of modules that say whether there is a weight, and a bias.
_WITH_WEIGHT = ("linear", "conv1d", "embedding", "norm", "router")
# Embeddings that are given distances between tokens, of which rows with other adapters share what they give.
_OF_DISTANCES = ("relative_attention_bias", "rel_embeddings")


def describe(model: nn.Module) -> BaseDescription:
    """Return the description of a transformers model, in the dtype that it computes in.

    Hashes the weights of embedding and head, unless the model is on the meta device.
    Raises ValueError for a model whose linears are already packed or wrapped: they no longer
    show how their weights are laid out.
    """
    modules: dict[str, ModuleInfo] = {}
    for name, module in model.named_modules():
        if name:
            modules[name] = _describe(name, module)
            modules |= _describe_parameters(name, module, modules[name].kind)
    if any(info.kind == "experts" for info in modules.values()):
        modules = _with_older_names(model, modules)
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    embedding = _name_of(model, "get_input_embeddings")
    head = _name_of(model, "get_output_embeddings")
    return BaseDescription(
        architecture=type(model).__name__,
        modules=modules,
        tied=_tied_groups(model, modules),
        input_embedding=embedding,
        output_head=head,
        dtype=str(dtype).removeprefix("torch."),
        weight_digests=_weight_digests(model, {embedding, head} - {""}),
    )


def describe_heads(heads: Mapping[str, Head]) -> dict[str, HeadDescription]:
    """Return what adapters can change of the heads that a model can have, by kind."""
    return {kind: _describe_head(head) for kind, head in heads.items()}


def _describe_head(head: Head) -> HeadDescription:
    named = [
        (name, module)
        for name, module in head.module.named_modules()
        if name and not (head.picked.pooler is not None and name.split(".")[0] == "pooler")
    ]
    infos = {name: _describe(name, module) for name, module in named}
    blocks = {name for name, module in named if any(module.children())}
    modules = {
        name: replace(info, kind="block") if name in blocks and _is_made_of(name, infos) else info
        for name, info in infos.items()
    }
    return HeadDescription(
        architecture=type(head.module).__name__,
        prefix=head.prefix,
        modules=modules,
        has_pooler=head.picked.pooler is not None,
        output=head.output,
        pooling=head.pooling,
        facts=head.facts,
    )


def _is_made_of(name: str, infos: Mapping[str, ModuleInfo]) -> bool:
    """Whether a block has something that can be replaced."""
    return any(info.replaceable for each, info in infos.items() if each.startswith(f"{name}."))


def _describe_parameters(name: str, module: nn.Module, kind: Kind) -> dict[str, ModuleInfo]:
    """Return the module's own parameters, by name, but those that its own kind tells of."""
    told = ("weight", "bias") if kind in _WITH_WEIGHT else ()
    layout = layout_of(module)
    experts = () if layout is None else (layout.up, layout.down)
    found = {}
    for part, parameter in module.named_parameters(recurse=False):
        if layout is not None and part in experts:
            found[f"{name}.{part}"] = _describe_experts(module, layout, part)
        elif part not in told:
            what = f"parameter of {type(module).__name__} with {_dimensions(parameter)}"
            found[f"{name}.{part}"] = ModuleInfo(kind="parameter", type_name=what)
    return found


def _describe_experts(module: nn.Module, layout: ExpertsLayout, part: str) -> ModuleInfo:
    """Return what a parameter is that holds a matrix for each expert."""
    num_experts, width_in, width_out = layout.widths(module, part)
    return ModuleInfo(
        kind="experts",
        type_name=f"parameter of {type(module).__name__}",
        in_features=width_in,
        out_features=width_out,
        num_experts=num_experts,
        # PEFT goes by this attribute alone.
        is_swapped=layout.is_in_first and not getattr(module, "is_transposed", False),
        is_interleaved=part != "down_proj" and not getattr(module, "is_concatenated", True),
    )


def _with_older_names(model: nn.Module, modules: Mapping[str, ModuleInfo]) -> dict[str, ModuleInfo]:
    """Return the modules of a mixture with what they were called."""
    names = OlderNames(model)
    found = dict(modules)
    for name, info in modules.items():
        if info.kind == "experts":
            found[name] = replace(info, older=names.of_experts(name))
        elif info.kind in ("linear", "router") and (older := names.of_module(name)):
            found[name] = replace(info, older=(older,))
    return found


def _dimensions(parameter: nn.Parameter) -> str:
    return "one dimension" if parameter.dim() == 1 else f"{parameter.dim()} dimensions"


def _weight_digests(model: nn.Module, names: set[str]) -> dict[str, str]:
    weights = {name: model.get_parameter(f"{name}.weight") for name in sorted(names)}
    known: dict[int, str] = {}
    for weight in weights.values():
        if id(weight) not in known and not weight.is_meta:
            known[id(weight)] = tensor_digest(weight)
    return {name: known[id(weight)] for name, weight in weights.items() if id(weight) in known}


def _describe(name: str, module: nn.Module) -> ModuleInfo:
    kind = type(module).__name__
    has_bias = getattr(module, "bias", None) is not None
    if kind == "PackedLinear":
        raise ValueError(f"{name} is packed; describe the model before its linears are replaced")
    if "experts" in name.split("."):
        # They see some tokens only, in an order of their own.
        return ModuleInfo(kind="other", type_name="part of MoE experts")
    if type(module) is nn.Linear:
        return _module("linear", kind, (module.in_features, module.out_features), has_bias)
    if name.rpartition(".")[2] in _OF_DISTANCES:
        return ModuleInfo(kind="other", type_name="table of distances")
    if isinstance(module, nn.Embedding) and (
        # Other subclasses take something else than ids, such as OPT's positions.
        type(module) is nn.Embedding or hasattr(module, "embed_scale")
    ):
        return _module("embedding", kind, (module.num_embeddings, module.embedding_dim), False)
    if is_router(module):
        out_features, in_features = module.get_parameter("weight").shape
        return _module("router", kind, (in_features, out_features), has_bias)
    shapes = {part: tuple(each.shape) for part, each in module.named_parameters()}
    if kind == "Conv1D":
        # transformers' own class, which is no subclass of anything that torch has.
        return _module("conv1d", kind, (shapes["weight"][0], shapes["weight"][1]), has_bias)
    if "weight" in shapes and shapes.keys() <= {"weight", "bias"} and not any(module.children()):
        vectors = all(len(shape) == 1 for shape in shapes.values())
        return _module("norm" if vectors else "other", kind, (0, shapes["weight"][0]), has_bias)
    return ModuleInfo(kind="other", type_name=kind, has_bias=has_bias)


def _module(kind: Kind, type_name: str, sizes: tuple[int, int], has_bias: bool) -> ModuleInfo:
    return ModuleInfo(
        kind=kind,
        type_name=type_name,
        in_features=sizes[0],
        out_features=sizes[1],
        has_bias=has_bias,
    )


def _tied_groups(
    model: nn.Module, modules: Mapping[str, ModuleInfo]
) -> tuple[tuple[str, ...], ...]:
    """Return the groups of adaptable modules that hold the very same weight."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module, _, part = name.rpartition(".")
        if part == "weight" and module in modules and modules[module].adaptable:
            holders.setdefault(id(parameter), []).append(module)
    return tuple(tuple(names) for names in holders.values() if len(names) > 1)


def _name_of(model: nn.Module, getter: str) -> str:
    get = getattr(model, getter, None)
    wanted = None if get is None else get()
    if wanted is None:
        return ""
    return next((name for name, module in model.named_modules() if module is wanted), "")
