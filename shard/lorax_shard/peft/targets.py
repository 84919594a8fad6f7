"""Which modules an adapter's options mean, by the rules that PEFT matches names with.

The rules look odd in places (a layer choice does not hold for a name given in full,
``modules_to_save`` matches ends of names across dots); they are PEFT's. Patterns come from
the adapter, so they run where a pattern that takes for ever can be stopped: in the process
that reads adapters, never beside the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.config import LoraOptions
from lorax_shard.peft.errors import AdapterRefusedError, listing, shorten

# The embeddings and heads that PEFT knows by name when it looks for tied weights.
_TIED_NAMES = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class LowRank:
    """A module with a low-rank part."""

    rank: int
    scaling: float
    # The embedding whose matrices this head shares (ensure_weight_tying); empty: its own.
    tied_to: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What an adapter's options select in the base model; all names are in full."""

    low_rank: Mapping[str, LowRank]
    # Trained as a whole, each with the embedding that it must agree with, or "".
    saved: Mapping[str, str]
    # Ids of replaced rows, and the embedding whose rows they are, or "" for its own.
    tokens: Mapping[str, tuple[tuple[int, ...], str]]


def select(options: LoraOptions, base: BaseDescription) -> Selection:
    """Return what the options select; raises AdapterRefusedError."""
    try:
        saved = _saved(options, base)
        low_rank = _low_rank(options, base)
    except re.error as error:
        raise AdapterRefusedError(
            f"a pattern of adapter_config.json is no regular expression: {shorten(error.pattern)}"
        ) from error
    tokens = _tokens(options, base)
    for names, what in ((saved, "modules_to_save"), (tokens, "trainable_token_indices")):
        both = sorted(set(low_rank) & set(names))
        if both:
            raise AdapterRefusedError(
                f"{listing(both)} has LoRA and is in {what} too; use one of them"
            )
    if set(saved) & set(tokens):
        both = sorted(set(saved) & set(tokens))
        raise AdapterRefusedError(
            f"{listing(both)} is in modules_to_save and trainable_token_indices; use one of them"
        )
    return Selection(low_rank=low_rank, saved=saved, tokens=tokens)


def is_selective(options: LoraOptions) -> bool:
    """Whether options beside ``target_modules`` pick modules out."""
    return options.layers_to_transform is not None or bool(options.exclude_modules)


def _low_rank(options: LoraOptions, base: BaseDescription) -> dict[str, LowRank]:
    targets = _targets(options, base)
    if not isinstance(targets, str):
        # Looked up for each module: lists can have a name for each of hundreds of linears.
        targets = frozenset(targets)
    tied = _tied_targets(options, base)
    # Tying makes the embedding a target even where only the head is named.
    chosen = [
        name
        for name in base.modules
        if (tied and name == base.input_embedding)
        or (name not in tied and _is_target(options, targets, name))
    ]
    if not chosen:
        raise AdapterRefusedError(
            f"target_modules {shorten(options.target_modules)} names nothing in this server's "
            f"base model ({base.architecture}); the adapter was made for another model"
        )
    _require_adaptable(chosen, "target_modules", base)
    found = {name: _ranked(options, name) for name in chosen}
    for name in tied:
        ranked = _ranked(options, name)
        found[name] = LowRank(ranked.rank, ranked.scaling, tied_to=base.input_embedding)
    return found


def _targets(options: LoraOptions, base: BaseDescription) -> str | Collection[str]:
    targets = options.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return tuple(
            name
            for name, info in base.modules.items()
            if info.kind in ("linear", "conv1d") and name != base.output_head
        )
    return targets


def _is_target(options: LoraOptions, targets: str | Collection[str], name: str) -> bool:
    """Return whether PEFT would give ``name`` a low-rank part."""
    if _is_excluded(options, name):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return _ends_with(name, targets) and _in_chosen_layer(options, name)


def _is_excluded(options: LoraOptions, name: str) -> bool:
    excluded = options.exclude_modules
    if isinstance(excluded, str):
        if excluded and re.fullmatch(excluded, name):
            return True
    elif name in excluded or _ends_with(name, excluded):
        return True
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in options.modules_to_save)


def _ends_with(name: str, ends: Collection[str]) -> bool:
    """Return whether ``name`` ends with a dot and one of the ends."""
    return any(name[dot.end() :] in ends for dot in re.finditer(r"\.", name))


def _in_chosen_layer(options: LoraOptions, name: str) -> bool:
    layers = options.layers_to_transform
    if layers is None:
        return True
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in options.layers_pattern]
    for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
        match = re.match(pattern, name)
        if match is not None:
            # A pattern of the adapter may have groups of its own; the number comes last.
            return int(match.groups()[-1]) in layers
    return False


def _ranked(options: LoraOptions, name: str) -> LowRank:
    rank = options.rank_pattern.get(_first_fit(options.rank_pattern, name), options.rank)
    alpha = options.alpha_pattern.get(_first_fit(options.alpha_pattern, name), options.alpha)
    return LowRank(rank, alpha / (math.sqrt(rank) if options.use_rslora else rank))


def _first_fit(patterns: Iterable[str], name: str) -> str:
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", name):
            return pattern
    return name


def _tied_targets(options: LoraOptions, base: BaseDescription) -> tuple[str, ...]:
    """Return the heads that get the low-rank part of the embedding."""
    if not options.ensure_weight_tying or _names_tied(options.modules_to_save):
        return ()
    targets = options.target_modules
    if isinstance(targets, str):
        wanted = any(re.fullmatch(targets, name) for name in _TIED_NAMES)
    else:
        wanted = _names_tied(targets)
    return base.tied_with(base.input_embedding) if wanted else ()


def _names_tied(names: Iterable[str]) -> bool:
    return any(name.rpartition(".")[2] in _TIED_NAMES for name in names)


def _saved(options: LoraOptions, base: BaseDescription) -> dict[str, str]:
    names = options.modules_to_save
    found = [name for name in base.modules if any(name.endswith(end) for end in names)]
    for name in found:
        if not base.modules[name].replaceable:
            raise AdapterRefusedError(
                f"modules_to_save names {name}, a {base.modules[name].type_name}; only linears, "
                "embeddings and norms can be replaced"
            )
    saved = dict.fromkeys(found, "")
    if options.ensure_weight_tying and _names_tied(names):
        tied = base.tied_with(base.input_embedding)
        if tied:
            saved |= {base.input_embedding: "", **dict.fromkeys(tied, base.input_embedding)}
    return saved


def _require_adaptable(names: Iterable[str], option: str, base: BaseDescription) -> None:
    for name in names:
        info = base.modules[name]
        if not info.adaptable:
            raise AdapterRefusedError(
                f"{option} names {name}, a {info.type_name}; only linears and embeddings "
                "can be adapted"
            )


def _tokens(options: LoraOptions, base: BaseDescription) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the ids of replaced rows by module."""
    wanted = {name or base.input_embedding: ids for name, ids in options.token_indices.items()}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for end, ids in wanted.items():
        names = [name for name in base.modules if name.endswith(end)]
        if not names:
            raise AdapterRefusedError(
                f"trainable_token_indices names {shorten(end)}, which this server's base model "
                f"({base.architecture}) does not have"
            )
        _require_adaptable(names, "trainable_token_indices", base)
        found |= dict.fromkeys(names, (ids, ""))
    return _with_tied_tokens(found, options, base)


def _with_tied_tokens(
    found: dict[str, tuple[tuple[int, ...], str]], options: LoraOptions, base: BaseDescription
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Give tied heads the rows of the embedding, as PEFT does unless the ids differ."""
    if base.input_embedding not in found:
        return found
    ids = found[base.input_embedding][0]
    tied = base.tied_with(base.input_embedding)
    if any(found.get(name, (ids, ""))[0] != ids for name in tied):
        if options.ensure_weight_tying:
            raise AdapterRefusedError(
                "trainable_token_indices has different ids for tied modules, and "
                "ensure_weight_tying wants them equal"
            )
        return found
    return found | dict.fromkeys(tied, (ids, base.input_embedding))
