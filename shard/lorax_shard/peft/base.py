"""What an adapter's reader must know of the base model, without having the model.

It goes as JSON to the process that reads adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, cast, get_args

from lorax_contract.pooling import HeadFacts, Pooling, ScoreKind

# conv1d: GPT-2's linear, whose weight is stored in x out. norm: a leaf with vectors as
# parameters, which can be replaced and not adapted. block: of a classification head, made of
# modules that can be replaced. experts: a parameter with one matrix for each expert, under the name
# of its module and its own. router: chooses experts by a weight like a linear's. parameter: any
# other bare parameter, under the name of its module and its own. other: can be neither adapted nor
# replaced.
Kind = Literal[
    "linear", "conv1d", "embedding", "norm", "block", "experts", "router", "parameter", "other"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleInfo:
    """One module of the base model, or one parameter that is not a linear's or an embedding's."""

    kind: Kind
    # The class, for sentences about modules that cannot be adapted.
    type_name: str
    # Of an embedding: rows and width. Of a norm: 0 and its length.
    in_features: int = 0
    out_features: int = 0
    has_bias: bool = False
    # Of experts: how many matrices.
    num_experts: int = 0
    # Of experts: PEFT takes their inputs for their outputs, so that its A is our B transposed.
    is_swapped: bool = False
    # Of experts: the outputs of its parts alternate, as gate and up do in gpt-oss.
    is_interleaved: bool = False
    # What it was in older releases of transformers: the name of the module, or of the linears that
    # are parts of a matrix of experts, in the order of its outputs, with * for an expert's number.
    older: tuple[str, ...] = ()

    @property
    def adaptable(self) -> bool:
        """Whether it can have a low-rank part: it is a linear or an embedding."""
        return self.kind in ("linear", "conv1d", "embedding")

    @property
    def replaceable(self) -> bool:
        """Whether an adapter can bring its parameters."""
        return self.kind not in ("block", "experts", "router", "parameter", "other")

    @property
    def is_parameter(self) -> bool:
        """Whether it is no module: no option but ``target_parameters`` can name it."""
        return self.kind in ("experts", "parameter")

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of its weight in its own layout."""
        if self.kind == "norm":
            return (self.out_features,)
        if self.kind in ("linear", "router"):
            return self.out_features, self.in_features
        return self.in_features, self.out_features


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadDescription:
    """A class with a classification head that the base model can have."""

    # The class, such as BertForSequenceClassification, and what it calls its backbone.
    architecture: str
    prefix: str
    # What it has beside that, without the backbone's pooler.
    modules: Mapping[str, ModuleInfo]
    # Whether that belongs to it.
    has_pooler: bool
    # The linear that computes the scores: as many as there are labels.
    output: str
    # What it is given.
    pooling: Pooling
    # None: the base has no weights for it, only adapters do.
    facts: HeadFacts | None = None

    def facts_with(self, num_labels: int) -> HeadFacts:
        """Return what the head of an adapter says that brings so many labels."""
        own = self.facts
        if own is not None and len(own.labels) == num_labels:
            return own
        labels = tuple(f"LABEL_{number}" for number in range(num_labels))
        # One score alone is the logit of a match.
        kind = ScoreKind.ANY_OF if num_labels == 1 else ScoreKind.ONE_OF
        return HeadFacts(pooling=self.pooling, labels=labels, scores=kind)


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
    # Whether low-rank matrices of linears keep the types in which adapters bring them.
    keeps_stored: bool = False
    # Digests of the weights of embeddings and heads, in that dtype. PEFT saves copies of those
    # beside LoRA on them; what is equal to the base's need not be kept for each adapter.
    weight_digests: Mapping[str, str] = field(default_factory=dict)
    # Its modules are those of the backbone's class; it generates nothing.
    is_backbone: bool = False
    # By kind, as rows name them.
    heads: Mapping[str, HeadDescription] = field(default_factory=dict)
    # The one that is among the modules, as adapters of a task see them; None: there is none.
    scores: HeadDescription | None = None

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
        document = {
            "architecture": self.architecture,
            "modules": _modules_to_json(self.modules),
            "tied": self.tied,
            "input_embedding": self.input_embedding,
            "output_head": self.output_head,
            "dtype": self.dtype,
            "keeps_stored": self.keeps_stored,
            "weight_digests": dict(self.weight_digests),
            "is_backbone": self.is_backbone,
            "heads": {kind: _head_to_json(head) for kind, head in self.heads.items()},
        }
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote."""
        document: dict[str, Any] = json.loads(text)
        return cls(
            architecture=document["architecture"],
            modules=_modules(document["modules"]),
            tied=tuple(tuple(group) for group in document["tied"]),
            input_embedding=document["input_embedding"],
            output_head=document["output_head"],
            dtype=document["dtype"],
            keeps_stored=document["keeps_stored"],
            weight_digests=document["weight_digests"],
            is_backbone=document["is_backbone"],
            heads={kind: _head(head) for kind, head in document["heads"].items()},
        )


def _modules_to_json(modules: Mapping[str, ModuleInfo]) -> dict[str, list[Any]]:
    return {
        name: [
            info.kind, info.type_name, info.in_features, info.out_features, info.has_bias,
            info.num_experts, info.is_swapped, info.is_interleaved, info.older,
        ]
        for name, info in modules.items()
    }  # fmt: skip


def _modules(document: Mapping[str, list[Any]]) -> dict[str, ModuleInfo]:
    return {name: _info(values) for name, values in document.items()}


def _head_to_json(head: HeadDescription) -> dict[str, Any]:
    facts = head.facts
    return {
        "architecture": head.architecture,
        "prefix": head.prefix,
        "modules": _modules_to_json(head.modules),
        "has_pooler": head.has_pooler,
        "output": head.output,
        "pooling": int(head.pooling),
        "facts": None if facts is None else [list(facts.labels), int(facts.scores)],
    }


def _head(document: Mapping[str, Any]) -> HeadDescription:
    pooling, facts = Pooling(document["pooling"]), document["facts"]
    own = None
    if facts is not None:
        own = HeadFacts(pooling=pooling, labels=tuple(facts[0]), scores=ScoreKind(facts[1]))
    values = {name: document[name] for name in ("architecture", "prefix", "has_pooler", "output")}
    return HeadDescription(
        modules=_modules(document["modules"]), pooling=pooling, facts=own, **values
    )


def _info(values: list[Any]) -> ModuleInfo:
    kind, type_name, in_features, out_features, has_bias, *of_experts = values
    if kind not in get_args(Kind):
        raise ValueError(f"module kind {kind!r} is unknown")
    num_experts, is_swapped, is_interleaved, older = of_experts
    return ModuleInfo(
        kind=cast("Kind", kind),
        type_name=type_name,
        in_features=in_features,
        out_features=out_features,
        has_bias=has_bias,
        num_experts=num_experts,
        is_swapped=is_swapped,
        is_interleaved=is_interleaved,
        older=tuple(older),
    )
