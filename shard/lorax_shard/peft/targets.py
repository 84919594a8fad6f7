"""Which modules an adapter's options mean, by the rules that PEFT matches names with.

The rules look odd in places (a layer choice does not hold for a name given in full,
``modules_to_save`` matches ends of names across dots); they are PEFT's. Patterns come from
the adapter, so they run where a pattern that takes for ever can be stopped (``matching``):
in the process that reads adapters, never beside the model.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.config import LoraOptions
from lorax_shard.peft.errors import AdapterRefusedError, listing, shorten
from lorax_shard.peft.parameters import ends_with, matched_parameters, named_by

# What has no operators but the dot.
PLAIN = re.compile(r"[\w.-]*")
# The embeddings and heads that PEFT knows by name when it looks for tied weights.
_TIED_NAMES = ("embed_tokens", "lm_head")
# What PEFT adds to modules_to_save for these tasks, whatever the model calls its head.
_USUAL_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


@dataclass(frozen=True, slots=True)
class LowRank:
    """A module with a low-rank part."""

    rank: int
    scaling: float
    # The embedding whose matrices this head shares (ensure_weight_tying); empty: its own.
    tied_to: str = ""
    # Chosen by target_parameters, whose matrices PEFT lays out by the parameter's own shape.
    of_parameter: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What an adapter's options select in the base model; all names are in full."""

    low_rank: Mapping[str, LowRank]
    # Trained as a whole, each with the embedding that it must agree with, or "".
    saved: Mapping[str, str]
    # Ids of replaced rows, and the embedding whose rows they are, or "" for its own.
    tokens: Mapping[str, tuple[tuple[int, ...], str]]
    # What somebody should know who wonders why the adapter does not do what it was made for.
    warnings: tuple[str, ...] = ()


def select(
    options: LoraOptions, base: BaseDescription, on_option: Callable[[str], None] | None = None
) -> Selection:
    """Return what the options select; raises AdapterRefusedError.

    ``on_option`` is told whose patterns are matched next.
    """
    return _Selector(options, base, on_option or (lambda _option: None)).select()


@dataclass(slots=True)
class _Patterns:
    """The patterns of one configuration, compiled once and matched in an option's name."""

    on_option: Callable[[str], None]
    _option: str = ""
    _compiled: dict[str, re.Pattern[str]] = field(default_factory=dict)

    def full(self, option: str, pattern: str, name: str) -> re.Match[str] | None:
        return self._of(option, pattern).fullmatch(name)

    def start(self, option: str, pattern: str, name: str) -> re.Match[str] | None:
        return self._of(option, pattern).match(name)

    def _of(self, option: str, pattern: str) -> re.Pattern[str]:
        if option != self._option:
            self._option = option
            self.on_option(option)
        compiled = self._compiled.get(pattern)
        if compiled is None:
            try:
                compiled = self._compiled[pattern] = re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise AdapterRefusedError(
                    f"{option} of adapter_config.json is no regular expression: {shorten(pattern)}"
                ) from error
        return compiled


class _Selector:
    """Applies the options of one adapter to the modules of one model."""

    def __init__(
        self, options: LoraOptions, base: BaseDescription, on_option: Callable[[str], None]
    ) -> None:
        self._options = options
        self._base = base
        self._patterns = _Patterns(on_option)
        self._warnings: list[str] = []
        # What was of use, by option.
        self._fitting: dict[str, set[str]] = {}
        self._num_excluded = 0
        self._modules = [name for name, info in base.modules.items() if not info.is_parameter]

    def select(self) -> Selection:
        """Return what the options select; raises AdapterRefusedError."""
        saved = self._saved()
        low_rank = self._low_rank()
        tokens = self._tokens()
        _refuse_twice(low_rank, saved, tokens)
        self._warn(low_rank)
        return Selection(
            low_rank=low_rank, saved=saved, tokens=tokens, warnings=tuple(self._warnings)
        )

    # --- the low-rank part ------------------------------------------------------------

    def _low_rank(self) -> dict[str, LowRank]:
        base, targets = self._base, self._targets()
        tied = self._tied_targets()
        # Tying makes the embedding a target even where only the head is named.
        chosen = [
            name
            for name in self._modules
            if (tied and name == base.input_embedding)
            or (name not in tied and self._is_target(targets, name))
        ]
        parameters = matched_parameters(self._options, base)
        if not chosen and not parameters:
            raise AdapterRefusedError(self._why_nothing())
        self._require_adaptable(chosen, "target_modules")
        found = {name: self._ranked(name) for name in chosen}
        for name in tied:
            ranked = self._ranked(name)
            found[name] = LowRank(ranked.rank, ranked.scaling, tied_to=base.input_embedding)
        self._warn_unmatched(found, parameters)
        return found | self._ranked_parameters(parameters, found)

    def _ranked_parameters(
        self, parameters: Mapping[str, str], modules: Mapping[str, LowRank]
    ) -> dict[str, LowRank]:
        both = sorted(set(parameters) & set(modules))
        if both:
            raise AdapterRefusedError(
                f"{listing(both)} is named by target_modules and by target_parameters, which PEFT "
                "refuses; name it in one of them"
            )
        ranked = {name: self._ranked(parameter) for name, parameter in parameters.items()}
        return {
            name: LowRank(each.rank, each.scaling, of_parameter=True)
            for name, each in ranked.items()
        }

    def _targets(self) -> str | Collection[str]:
        targets = self._options.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return frozenset(
                name
                for name, info in self._base.modules.items()
                if info.kind in ("linear", "conv1d") and name not in self._not_adapted()
            )
        # Looked up for each module: lists can have a name for each of hundreds of linears.
        return targets if isinstance(targets, str) else frozenset(targets)

    def _not_adapted(self) -> tuple[str, ...]:
        """Return the heads that PEFT leaves out of all linears: of their classes, by these names."""
        heads = ("score", "classifier") if self._options.task == "SEQ_CLS" else ()
        own = next((name for name in heads if name in self._base.modules), "")
        return self._base.output_head, own

    def _is_target(self, targets: str | Collection[str], name: str) -> bool:
        """Return whether PEFT would give ``name`` a low-rank part."""
        if self._is_excluded(name):
            self._num_excluded += 1
            return False
        if isinstance(targets, str):
            return self._patterns.full("target_modules", targets, name) is not None
        if name in targets:
            return True
        return ends_with(name, targets) and self._in_chosen_layer(name)

    def _is_excluded(self, name: str) -> bool:
        excluded = self._options.exclude_modules
        if isinstance(excluded, str):
            if excluded and self._patterns.full("exclude_modules", excluded, name):
                return True
        elif name in excluded or ends_with(name, excluded):
            return True
        return any(
            self._patterns.start("modules_to_save", rf"(^|.*\.){saved}($|\..*)", name)
            for saved in self._options.modules_to_save
        )

    def _in_chosen_layer(self, name: str) -> bool:
        options = self._options
        if options.layers_to_transform is None:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in options.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."]:
            match = self._patterns.start("layers_pattern", pattern, name)
            if match is not None:
                # A pattern of the adapter may have groups of its own; the number comes last.
                return int(match.groups()[-1]) in options.layers_to_transform
        return False

    def _ranked(self, name: str) -> LowRank:
        options = self._options
        rank = options.rank_pattern.get(self._first_fit("rank_pattern", name), options.rank)
        alpha = options.alpha_pattern.get(self._first_fit("alpha_pattern", name), options.alpha)
        return LowRank(rank, alpha / (math.sqrt(rank) if options.use_rslora else rank))

    def _first_fit(self, option: str, name: str) -> str:
        patterns: Mapping[str, object] = getattr(self._options, option)
        for pattern in patterns:
            if _can_end(name, pattern) and self._patterns.start(
                option, rf"(.*\.)?({pattern})$", name
            ):
                self._fitting.setdefault(option, set()).add(pattern)
                return pattern
        return name

    def _tied_targets(self) -> tuple[str, ...]:
        """Return the heads that get the low-rank part of the embedding."""
        options = self._options
        if not options.ensure_weight_tying or _names_tied(options.modules_to_save):
            return ()
        targets = options.target_modules
        if isinstance(targets, str):
            wanted = any(
                self._patterns.full("target_modules", targets, name) for name in _TIED_NAMES
            )
        else:
            wanted = _names_tied(targets)
        return self._base.tied_with(self._base.input_embedding) if wanted else ()

    def _why_nothing(self) -> str:
        targets = self._options.target_modules
        if not targets:
            return (
                f"target_parameters {shorten(self._options.target_parameters)} names nothing in this "
                f"server's base model ({self._base.architecture}); the adapter was made for another "
                "model"
            )
        if isinstance(targets, str):
            # A string is matched with whole names: a list without its brackets matches none.
            names = [name.strip() for name in targets.split(",")]
            if any(name in each.split(".") for name in names for each in self._modules):
                return (
                    f"target_modules is the string {shorten(targets)}, which is a pattern for "
                    "whole names of modules and matches none; write a list to name their ends: "
                    f"{json.dumps(names)}"
                )
        return (
            f"target_modules {shorten(targets)} names nothing in this server's base model "
            f"({self._base.architecture}); the adapter was made for another model"
        )

    # --- what is replaced -------------------------------------------------------------

    def _saved(self) -> dict[str, str]:
        names, base = self._options.modules_to_save, self._base
        found = [name for name in self._modules if any(name.endswith(end) for end in names)]
        found = [part for name in found for part in self._parts(name)]
        for name in found:
            if not base.modules[name].replaceable:
                raise AdapterRefusedError(
                    f"modules_to_save names {name}, a {base.modules[name].type_name}; only "
                    "linears, embeddings and norms can be replaced"
                )
        saved = dict.fromkeys(found, "")
        if self._options.ensure_weight_tying and _names_tied(names):
            tied = base.tied_with(base.input_embedding)
            if tied:
                saved |= {base.input_embedding: "", **dict.fromkeys(tied, base.input_embedding)}
        return saved

    def _parts(self, name: str) -> list[str]:
        """Return what is replaced where a module is: of a block of a head what it is made of."""
        modules = self._base.modules
        if modules[name].kind != "block":
            return [name]
        return [
            each for each in modules if each.startswith(f"{name}.") and modules[each].replaceable
        ]

    def _tokens(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return the ids of replaced rows by module."""
        base = self._base
        given = self._options.token_indices
        wanted = {name or base.input_embedding: ids for name, ids in given.items()}
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for end, ids in wanted.items():
            names = [name for name in self._modules if name.endswith(end)]
            if not names:
                raise AdapterRefusedError(
                    f"trainable_token_indices names {shorten(end)}, which this server's base "
                    f"model ({base.architecture}) does not have"
                )
            self._require_adaptable(names, "trainable_token_indices")
            found |= dict.fromkeys(names, (ids, ""))
        return _with_tied_tokens(found, self._options, base)

    def _require_adaptable(self, names: Iterable[str], option: str) -> None:
        for name in names:
            info = self._base.modules[name]
            if not info.adaptable:
                raise AdapterRefusedError(
                    f"{option} names {name}, a {info.type_name}; only linears and embeddings "
                    "can be adapted"
                )

    # --- warnings -----------------------------------------------------------------------

    def _warn(self, low_rank: Mapping[str, LowRank]) -> None:
        options = self._options
        mute = [name for name, chosen in low_rank.items() if chosen.scaling == 0]
        if mute:
            everywhere = "every module" if len(mute) == len(low_rank) else listing(mute)
            self._warnings.append(f"lora_alpha is 0 for {everywhere}: nothing is added there")
        usual = _USUAL_HEADS.get(options.task or "", ())
        wanted = [end for end in options.modules_to_save if end not in usual]
        idle = [end for end in wanted if not any(n.endswith(end) for n in self._modules)]
        for option in ("rank_pattern", "alpha_pattern"):
            fitting = self._fitting.get(option, set())
            self._warn_idle(
                option, [each for each in getattr(options, option) if each not in fitting]
            )
        self._warn_idle("modules_to_save", idle)
        if options.exclude_modules and not self._num_excluded:
            self._warnings.append("exclude_modules excludes nothing of this base model")

    def _warn_unmatched(
        self, modules: Mapping[str, LowRank], parameters: Mapping[str, str]
    ) -> None:
        options = self._options
        if options.target_modules and not modules:
            self._warnings.append("target_modules names nothing in this base model")
        names = parameters.values()
        idle = [end for end in options.target_parameters if not named_by((end,), names)]
        self._warn_idle("target_parameters", idle)

    def _warn_idle(self, option: str, names: list[str]) -> None:
        if names:
            self._warnings.append(
                f"{option} has entries that fit nothing in this base model: {listing(names)}"
            )


def _refuse_twice(
    low_rank: Mapping[str, LowRank], saved: Mapping[str, str], tokens: Mapping[str, object]
) -> None:
    for names, what in ((saved, "modules_to_save"), (tokens, "trainable_token_indices")):
        both = sorted(set(low_rank) & set(names))
        if both:
            raise AdapterRefusedError(
                f"{listing(both)} has LoRA and is in {what} too; use one of them"
            )
    both = sorted(set(saved) & set(tokens))
    if both:
        raise AdapterRefusedError(
            f"{listing(both)} is in modules_to_save and trainable_token_indices; use one of them"
        )


def _can_end(name: str, pattern: str) -> bool:
    """Return whether whole parts of a name have the length of a pattern, if that has no operators.

    Spares most comparisons: there can be a pattern and a name for each of thousands of experts.
    """
    before = len(name) - len(pattern)
    return before == 0 or (before > 0 and name[before - 1] == ".") or not _is_plain(pattern)


@functools.lru_cache(maxsize=4096)
def _is_plain(pattern: str) -> bool:
    return PLAIN.fullmatch(pattern) is not None


def _names_tied(names: Iterable[str]) -> bool:
    return any(name.rpartition(".")[2] in _TIED_NAMES for name in names)


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
