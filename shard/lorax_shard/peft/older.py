"""Adapters of mixtures whose experts were linears of their own when they were made.

Older releases of transformers had a linear for each matrix of each expert, and PEFT wrote A and B
for each (``experts.3.gate_proj.lora_A.weight``). Trainers that write for other servers put those of
all experts into one tensor (``experts.w1.lora_A.weight``: experts x rank x in), with one expert
where all share the factor. To such an adapter the base is shown with these linears, so that its
options choose them, and its tensors are checked, as of any other. What it changes is then put
together as changes of the parameters that the linears have become.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lorax_shard.lora.delta import HostAdapter, ModuleDelta
from lorax_shard.peft.base import BaseDescription, ModuleInfo
from lorax_shard.peft.config import LoraOptions
from lorax_shard.peft.errors import AdapterRefusedError, listing
from lorax_shard.peft.files import AdapterLimits, TensorInfo
from lorax_shard.peft.keys import KeyPart, Parts
from lorax_shard.peft.stacking import ExpertLinear, num_parts, stacked

# What a stack of the matrices of all experts is called, by the parameter and the part of its outputs.
_STACKS = {
    ("gate_up_proj", 0): ("gate_proj", "w1"),
    ("gate_up_proj", 1): ("up_proj", "w3"),
    ("up_proj", 0): ("up_proj",),
    ("down_proj", 0): ("down_proj", "w2"),
}
_NUMBERED = re.compile(r"(.+\.)(\d{1,6})(\..+)")
_FACTORS = (KeyPart.A, KeyPart.B)


@dataclass(frozen=True, slots=True, kw_only=True)
class OlderBase:
    """The base as an adapter of another time names it."""

    base: BaseDescription
    parts: Parts
    infos: Mapping[str, TensorInfo]
    # The linears of experts by their names there; the modules that have another name here.
    pieces: Mapping[str, ExpertLinear] = field(default_factory=dict)
    served: Mapping[str, str] = field(default_factory=dict)
    # The routers that it changes, by their names there: they were linears.
    routers: frozenset[str] = frozenset()
    # What the linears of experts have become, by name.
    parameters: Mapping[str, ModuleInfo] = field(default_factory=dict)

    def check(self, options: LoraOptions) -> None:
        """Refuse options that reach the linears and that their parameters cannot have."""
        given = {
            "use_dora": options.use_dora,
            "lora_bias": options.lora_bias,
            "alora_invocation_tokens": bool(options.invocation_ids),
        }
        for name, is_given in given.items():
            if is_given and self.pieces:
                raise AdapterRefusedError(
                    f"it adapts experts ({listing(list(self.pieces), 1)}) with {name}, which PEFT "
                    "does not compute on experts; train without it"
                )

    def served_by(self, adapter: HostAdapter, limits: AdapterLimits) -> HostAdapter:
        """Return an adapter with the names and parameters that the base has here."""
        modules: dict[str, ModuleDelta] = {}
        stacks: dict[str, dict[ExpertLinear, ModuleDelta]] = {}
        for name, delta in adapter.modules.items():
            piece = self.pieces.get(name)
            if piece is not None or name in self.routers:
                _require_plain(name, delta)
            if piece is None:
                modules[self.served.get(name, name)] = delta
            else:
                stacks.setdefault(piece.parameter, {})[piece] = delta
        for parameter, pieces in stacks.items():
            if parameter in modules:
                raise AdapterRefusedError(
                    f"it changes {parameter} as a parameter, and the linears of its experts too"
                )
            modules[parameter] = stacked(self.parameters[parameter], pieces)
            _check_rank(parameter, modules[parameter], limits)
        return dataclasses.replace(adapter, modules=modules)


def present_base(base: BaseDescription, parts: Parts, infos: Mapping[str, TensorInfo]) -> OlderBase:
    """Return the base as it is for an adapter that names it so."""
    return OlderBase(base=base, parts=parts, infos=infos, routers=_routers(base, parts, {}))


def older_base(
    base: BaseDescription, parts: Parts, infos: Mapping[str, TensorInfo], options: LoraOptions
) -> OlderBase:
    """Return the base as the adapter with these parts names it; raises AdapterRefusedError."""
    known = {name for name, info in base.modules.items() if not info.is_parameter}
    strangers = [name for name in parts if name not in known]
    served = _renamed(base, strangers)
    pieces = _pieces(base, strangers)
    stacks = {name: piece for name, piece in pieces.items() if piece.expert is None}
    routers = _routers(base, parts, served)
    found = OlderBase(
        base=_shown(base, pieces, served, routers),
        routers=routers,
        parameters={name: info for name, info in base.modules.items() if info.is_parameter},
        parts=parts,
        infos={**infos, **_without_experts(base, stacks, parts, infos)},
        pieces=pieces,
        served=served,
    )
    found.check(options)
    return _called_by(found, stacks, options)


def _routers(base: BaseDescription, parts: Parts, served: Mapping[str, str]) -> frozenset[str]:
    infos = {name: base.modules.get(served.get(name, name)) for name in parts}
    return frozenset(name for name, info in infos.items() if info and info.kind == "router")


def _renamed(base: BaseDescription, strangers: list[str]) -> dict[str, str]:
    """Return what modules are called here, of the names that the base had for them once."""
    older = {
        info.older[0]: name
        for name, info in base.modules.items()
        if info.older and not info.is_parameter and name != base.output_head
    }
    return {name: older[name] for name in strangers if name in older}


def _pieces(base: BaseDescription, strangers: list[str]) -> dict[str, ExpertLinear]:
    """Return the linears of experts among names that the base does not have."""
    numbered = {
        linear: (name, part)
        for name, info in base.modules.items()
        if info.kind == "experts"
        for part, linear in enumerate(info.older)
    }
    stacks = dict(_stacks(base))
    found: dict[str, ExpertLinear] = {}
    for name in strangers:
        match = _NUMBERED.fullmatch(name)
        place = None if match is None else numbered.get(f"{match[1]}*{match[3]}")
        if match is not None and place is not None:
            found[name] = ExpertLinear(*place, _expert(name, int(match[2]), base.modules[place[0]]))
        elif name in stacks:
            found[name] = ExpertLinear(*stacks[name], None)
    return found


def _stacks(base: BaseDescription) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield the names of tensors of all experts, and what they are parts of."""
    for name, info in base.modules.items():
        module, _, own = name.rpartition(".")
        for (parameter, part), linears in _STACKS.items():
            if info.kind == "experts" and parameter == own:
                # Where the experts lay once, and where they lie now.
                places = {module, *(each.rpartition(".*.")[0] for each in info.older)}
                for place in places:
                    yield from ((f"{place}.{linear}", (name, part)) for linear in linears)


def _expert(name: str, number: int, info: ModuleInfo) -> int:
    if number >= info.num_experts:
        raise AdapterRefusedError(
            f"it has weights for {name}, and this server's base model has {info.num_experts} "
            "experts there; the adapter was made for another base model"
        )
    return number


def _shown(
    base: BaseDescription,
    pieces: Mapping[str, ExpertLinear],
    served: Mapping[str, str],
    routers: frozenset[str],
) -> BaseDescription:
    """Return the base with the linears of experts, and with the names of that time."""
    older = {name: each for each, name in served.items()}
    modules: dict[str, ModuleInfo] = {}
    for name, info in base.modules.items():
        seen = older.get(name, name)
        modules[seen] = dataclasses.replace(info, kind="linear") if seen in routers else info
    for name, piece in pieces.items():
        info = base.modules[piece.parameter]
        modules[name] = ModuleInfo(
            kind="linear",
            type_name="linear of an expert",
            in_features=info.in_features,
            out_features=info.out_features // num_parts(piece.parameter),
        )
    return dataclasses.replace(base, modules=modules)


def _without_experts(
    base: BaseDescription,
    stacks: Mapping[str, ExpertLinear],
    parts: Parts,
    infos: Mapping[str, TensorInfo],
) -> dict[str, TensorInfo]:
    """Return what tensors of all experts are to each; raises AdapterRefusedError."""
    found = {}
    for name, piece in stacks.items():
        num_experts = base.modules[piece.parameter].num_experts
        for part, key in parts[name].items():
            shape = infos[key].shape
            if part not in _FACTORS or len(shape) != 3 or shape[0] not in (1, num_experts):
                raise AdapterRefusedError(
                    f"{key} has the shape {list(shape)}; A and B of all experts must have three "
                    f"dimensions, the first of them {num_experts}, or 1 where experts share it"
                )
            found[key] = TensorInfo(infos[key].dtype, shape[1:])
    return found


def _called_by(
    found: OlderBase, stacks: Mapping[str, ExpertLinear], options: LoraOptions
) -> OlderBase:
    """Return the base with stacks called as target_modules calls them, where it says gate_proj for w1."""
    targets = options.target_modules
    if isinstance(targets, str) or not stacks:
        return found
    named = {target.rpartition(".")[2] for target in targets}
    names = {}
    for name, piece in stacks.items():
        module, _, own = name.rpartition(".")
        usual = _STACKS[piece.parameter.rpartition(".")[2], piece.part][0]
        if own not in named and usual in named and f"{module}.{usual}" not in found.parts:
            names[name] = f"{module}.{usual}"
    return dataclasses.replace(
        found,
        base=dataclasses.replace(
            found.base,
            modules={names.get(name, name): info for name, info in found.base.modules.items()},
        ),
        parts={names.get(name, name): each for name, each in found.parts.items()},
        pieces={names.get(name, name): piece for name, piece in found.pieces.items()},
    )


def _require_plain(name: str, delta: ModuleDelta) -> None:
    if delta.a is None or delta.b is None or delta.nbytes != delta.a.nbytes + delta.b.nbytes:
        raise AdapterRefusedError(
            f"it brings more than A and B for {name}; of experts and routers only low-rank parts "
            "are computed"
        )


def _check_rank(parameter: str, delta: ModuleDelta, limits: AdapterLimits) -> None:
    if delta.rank > limits.max_rank:
        raise AdapterRefusedError(
            f"the linears that are parts of {parameter} have the rank {delta.rank} together; the "
            f"limit is {limits.max_rank}"
        )
