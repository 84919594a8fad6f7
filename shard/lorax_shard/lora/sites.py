"""The places of a model that an adapter can change, found from outside.

Legend: in and out are a linear's widths; an embedding maps vocabulary to dim.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lorax_shard.linear.packed import PackedLinear
from lorax_shard.linear.targets import SIBLINGS
from lorax_shard.mixture.layout import is_router, layout_of


class Kind(enum.Enum):
    """What a module computes."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    # A norm or another leaf that treats each token by itself, with vectors as parameters.
    VECTOR = "norm"
    # A parameter with a matrix for each expert; sites have its name, and its module.
    EXPERTS = "experts"
    # Chooses the experts of a token.
    ROUTER = "router"


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One module that an adapter can change."""

    name: str
    module: nn.Module
    kind: Kind
    # Linear, router, experts: in and out. Embedding: vocabulary and dim. Vector: 0 and the length. Of the whole
    # module, where the model is one rank's part.
    in_features: int
    out_features: int
    # It computes the logit rows of a step, not its tokens.
    is_head: bool
    # Its weight is kept as in x out (Conv1D).
    is_transposed: bool
    # An adapter may replace it by one of another width: it computes the scores of labels.
    has_any_width: bool = False
    # It is part of a head that makes scores of labels, which is computed after a step's tokens.
    is_after_pass: bool = False
    # Of experts: how many matrices there are.
    num_experts: int = 0

    @property
    def widths(self) -> tuple[int, int]:
        """In and out of a linear or of experts as they are here: of a rank's part, where it is one."""
        module: Any = self.module
        if self.kind is Kind.EXPERTS:
            layout = layout_of(module)
            assert layout is not None
            return layout.widths(module, self.name.rpartition(".")[2])[1:]
        if isinstance(module, PackedLinear):
            return module.in_features, module.out_features
        rows, columns = module.weight.shape
        return (rows, columns) if self.is_transposed else (columns, rows)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: out x in, or vocabulary x dim; may have to be made."""
        weight: torch.Tensor = self.module.weight  # type: ignore[assignment]
        is_conv1d = self.is_transposed and not isinstance(self.module, PackedLinear)
        return weight.detach().T if is_conv1d else weight.detach()

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        bias: torch.Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach()

    @property
    def embed_scale(self) -> float:
        """What an embedding multiplies its rows with."""
        scale = getattr(self.module, "embed_scale", 1.0)
        return float(scale)


def find_sites(
    model: nn.Module, whole: nn.Module | None = None, outputs: Collection[str] = ()
) -> dict[str, Site]:
    """Return all places by their name in the model.

    ``whole`` is the model of full size, without values, where ``model`` is a part of it;
    ``outputs`` are the linears that compute scores of labels.
    """
    head = _output_embeddings(model)
    label_heads = {name.partition(".")[0] for name in outputs}
    widths = {} if whole is None else find_sites(whole)
    sites: dict[str, Site] = {}
    for name, module in model.named_modules():
        for part, own in _experts(name, module).items():
            full = widths.get(part, own)
            sites[part] = replace(own, in_features=full.in_features, out_features=full.out_features)
        # Experts see some tokens only, in an order of their own.
        if "experts" in name.split("."):
            continue
        site = _site(name, module, is_head=module is head)
        if site is not None:
            full = widths.get(name, site)
            sites[name] = replace(
                site, in_features=full.in_features, out_features=full.out_features,
                has_any_width=name in outputs, is_after_pass=name.partition(".")[0] in label_heads,
            )  # fmt: skip
    return sites


def find_groups(sites: dict[str, Site]) -> Iterator[list[Site]]:
    """Yield the linears: those that read the same tensor together, all others alone."""
    taken: set[str] = set()
    for name, site in sites.items():
        if site.kind is not Kind.LINEAR or name in taken:
            continue
        parent, _, own = name.rpartition(".")
        names = next((names for names in SIBLINGS if own in names), (own,))
        paths = [f"{parent}.{each}" if parent else each for each in names]
        group = [sites[path] for path in paths if path in sites and path not in taken]
        group = [
            each
            for each in group
            if each.kind is Kind.LINEAR and each.in_features == site.in_features
        ]
        taken.update(each.name for each in group)
        yield group


def find_experts(sites: dict[str, Site]) -> Iterator[dict[str, Site]]:
    """Yield the parameters of experts, those of one module together, in their order."""
    of_module: dict[int, dict[str, Site]] = {}
    for name, site in sites.items():
        if site.kind is Kind.EXPERTS:
            of_module.setdefault(id(site.module), {})[name] = site
    yield from of_module.values()


def _experts(name: str, module: nn.Module) -> dict[str, Site]:
    layout = layout_of(module)
    if layout is None:
        return {}
    found = {}
    for part in (layout.up, layout.down):
        num, width_in, width_out = layout.widths(module, part)
        found[f"{name}.{part}"] = Site(
            f"{name}.{part}", module, Kind.EXPERTS, width_in, width_out, is_head=False,
            is_transposed=layout.is_in_first, num_experts=num,
        )  # fmt: skip
    return found


def _site(name: str, module: nn.Module, *, is_head: bool) -> Site | None:
    kind, transposed = Kind.LINEAR, False
    if type(module) is nn.Linear or isinstance(module, PackedLinear):
        shape = (module.in_features, module.out_features)
        transposed = bool(getattr(module, "is_transposed", False))
    elif _is_conv1d(module):
        weight = module.get_parameter("weight")
        shape, transposed = (weight.shape[0], weight.shape[1]), True
    elif _is_embedding(module):
        assert isinstance(module, nn.Embedding)
        kind, shape = Kind.EMBEDDING, (module.num_embeddings, module.embedding_dim)
    elif is_router(module):
        weight = module.get_parameter("weight")
        kind, shape = Kind.ROUTER, (weight.shape[1], weight.shape[0])
    elif _is_vector(module):
        kind, shape = Kind.VECTOR, (0, next(module.parameters()).shape[0])
    else:
        return None
    return Site(name, module, kind, *shape, is_head, transposed)


def _is_conv1d(module: nn.Module) -> bool:
    # GPT-2's linear, which keeps its weight as in x out; known by name, so that this package
    # does not import transformers.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def _is_embedding(module: nn.Module) -> bool:
    # Other subclasses take something else than ids, such as OPT's positions from a mask.
    return type(module) is nn.Embedding or (
        isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
    )


def _is_vector(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    return (
        bool(parameters)
        and not any(module.children())
        and parameters.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in parameters.values())
    )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter: Any = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()
