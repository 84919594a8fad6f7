"""Which parameters of the base model an adapter's ``target_parameters`` mean.

PEFT compares the ends of names, looks at no other option that chooses modules, and wraps the module
that holds the parameter. It takes parameters with two dimensions for the weights of linears, and
those with three for a matrix of each expert.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from lorax_shard.peft.base import BaseDescription, ModuleInfo
from lorax_shard.peft.config import LoraOptions
from lorax_shard.peft.errors import AdapterRefusedError

_WITH_WEIGHT = ("linear", "conv1d", "embedding", "norm", "router")


def matched_parameters(options: LoraOptions, base: BaseDescription) -> dict[str, str]:
    """Return the full names of the parameters, by the names that the description has for them.

    Raises AdapterRefusedError for parameters that are not computed.
    """
    ends = frozenset(options.target_parameters)
    found: dict[str, str] = {}
    for name, parameter in _parameters(base) if ends else ():
        if named_by(ends, (parameter,)):
            _require_computed(parameter, base.modules[name])
            found[name] = parameter
    if found:
        _refuse_together(options)
    return found


def named_by(ends: Collection[str], names: Iterable[str]) -> bool:
    """Return whether one of the names is among the ends, or ends with a dot and one of them."""
    return any(name in ends or ends_with(name, ends) for name in names)


def ends_with(name: str, ends: Collection[str]) -> bool:
    """Return whether ``name`` ends with a dot and one of the ends."""
    return any(name[dot.end() :] in ends for dot in re.finditer(r"\.", name))


def _parameters(base: BaseDescription) -> Iterator[tuple[str, str]]:
    """Yield what has each parameter of the model in the description, and its full name."""
    for name, info in base.modules.items():
        if info.is_parameter:
            yield name, name
        elif info.kind in _WITH_WEIGHT:
            yield name, f"{name}.weight"
            if info.has_bias:
                yield name, f"{name}.bias"


def _require_computed(parameter: str, info: ModuleInfo) -> None:
    if info.is_parameter:
        is_computed, what = info.kind == "experts", info.type_name
    else:
        is_computed = info.kind != "norm" and parameter.endswith(".weight")
        what = f"parameter of {info.type_name} with one dimension"
    if not is_computed:
        raise AdapterRefusedError(
            f"target_parameters names {parameter}, a {what}; only the matrices of experts and the "
            "weights of routers, linears and embeddings can be adapted"
        )


def _refuse_together(options: LoraOptions) -> None:
    """Refuse what PEFT does not compute, or refuses, beside parameters."""
    given = {
        "use_dora": options.use_dora,
        "lora_bias": options.lora_bias,
        "alora_invocation_tokens": bool(options.invocation_ids),
    }
    for name, is_given in given.items():
        if is_given:
            raise AdapterRefusedError(
                f"target_parameters and {name} exclude each other in PEFT; use one of them"
            )
