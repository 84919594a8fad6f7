"""What an adapter's reader must know of the base model, without having the model.

``describe`` is called once, on the model as transformers builds it (a meta device is
enough) and before linears are packed or wrapped; the description goes as JSON to the
process that reads adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import nn

from lorax_shard.peft.digest import tensor_digest

# conv1d: GPT-2's linear, whose weight is stored in x out. norm: a leaf with vectors as
# parameters, which can be replaced and not adapted. other: can be neither.
Kind = Literal["linear", "conv1d", "embedding", "norm", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleInfo:
    """One module of the base model."""

    kind: Kind
    # The class, for sentences about modules that cannot be adapted.
    type_name: str
    # Of an embedding: rows and width. Of a norm: 0 and its length.
    in_features: int = 0
    out_features: int = 0
    has_bias: bool = False

    @property
    def adaptable(self) -> bool:
        """Whether it can have a low-rank part: it is a linear or an embedding."""
        return self.kind in ("linear", "conv1d", "embedding")

    @property
    def replaceable(self) -> bool:
        """Whether an adapter can bring its parameters."""
        return self.kind != "other"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of its weight in its own layout."""
        if self.kind == "norm":
            return (self.out_features,)
        if self.kind == "linear":
            return self.out_features, self.in_features
        return self.in_features, self.out_features


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseDescription:
    """The base model: its modules in order, which share their weight, and its class."""

    # The class that transformers builds, such as LlamaForCausalLM.
    architecture: str
    modules: Mapping[str, ModuleInfo]
    # Groups of modules with one weight between them.
    tied: tuple[tuple[str, ...], ...] = ()
    # Names of the token embedding and of the output head.
    input_embedding: str = ""
    output_head: str = ""
    # Name of the dtype that the model computes in.
    dtype: str = "float32"
    # Digests of the weights of embeddings and heads, in that dtype. PEFT saves copies of those
    # beside LoRA on them; what is equal to the base's need not be kept for each adapter.
    weight_digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding; 0: unknown."""
        info = self.modules.get(self.input_embedding)
        return 0 if info is None else info.in_features

    def tied_with(self, name: str) -> tuple[str, ...]:
        """Return the other modules that share the weight of ``name``."""
        for group in self.tied:
            if name in group:
                return tuple(each for each in group if each != name)
        return ()

    def to_json(self) -> str:
        """Return the description as one JSON document."""
        modules = {
            name: [info.kind, info.type_name, info.in_features, info.out_features, info.has_bias]
            for name, info in self.modules.items()
        }
        document = {
            "architecture": self.architecture,
            "modules": modules,
            "tied": self.tied,
            "input_embedding": self.input_embedding,
            "output_head": self.output_head,
            "dtype": self.dtype,
            "weight_digests": dict(self.weight_digests),
        }
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote."""
        document: dict[str, Any] = json.loads(text)
        return cls(
            architecture=document["architecture"],
            modules={name: _info(values) for name, values in document["modules"].items()},
            tied=tuple(tuple(group) for group in document["tied"]),
            input_embedding=document["input_embedding"],
            output_head=document["output_head"],
            dtype=document["dtype"],
            weight_digests=document["weight_digests"],
        )


def _info(values: list[Any]) -> ModuleInfo:
    kind, type_name, in_features, out_features, has_bias = values
    if kind not in get_args(Kind):
        raise ValueError(f"module kind {kind!r} is unknown")
    return ModuleInfo(
        kind=cast("Kind", kind),
        type_name=type_name,
        in_features=in_features,
        out_features=out_features,
        has_bias=has_bias,
    )


def describe(model: nn.Module) -> BaseDescription:
    """Return the description of a transformers model, in the dtype that it computes in.

    Hashes the weights of embedding and head, unless the model is on the meta device.
    Raises ValueError for a model whose linears are already packed or wrapped: they no longer
    show how their weights are laid out.
    """
    modules = {name: _describe(name, module) for name, module in model.named_modules() if name}
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
    if isinstance(module, nn.Embedding) and (
        # Other subclasses take something else than ids, such as OPT's positions.
        type(module) is nn.Embedding or hasattr(module, "embed_scale")
    ):
        return _module("embedding", kind, (module.num_embeddings, module.embedding_dim), False)
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
