"""Reads adapter_config.json: every option is checked, and the ones that matter are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lorax_shard.adapter_files import CONFIG_FILE
from lorax_shard.peft.errors import AdapterRefusedError, shorten
from lorax_shard.peft.fields import BY_NAME, refuse_option

# Names and patterns of a configuration: no more than this many, none longer.
_MAX_NAMES = 20_000
_MAX_NAME_LENGTH = 2_000
# Tokens that invoke an adapter: no more than this many.
_MAX_INVOCATION = 1_000
# Variants of LoRA that PEFT computes without activation only.
_NOT_ACTIVATED = ("use_dora", "velora_config")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOptions:
    """The options of a LoRA adapter that decide what it computes."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    # A regular expression (or all-linear), or names.
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    # None: all layers.
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    # By module; under the empty name: of the token embedding.
    token_indices: Mapping[str, tuple[int, ...]]
    ensure_weight_tying: bool
    # The class of the model that it was trained on, and its name; empty: not said.
    trained_class: str
    trained_on: str = ""
    # From the last of these in a prompt on the adapter acts; empty: all the time.
    invocation_ids: tuple[int, ...] = ()
    # What it was trained for; None: not said.
    task: str | None = None
    # Ends of the names of parameters.
    target_parameters: tuple[str, ...] = ()


def parse_config(text: str | bytes) -> LoraOptions:
    """Return the options of an adapter_config.json; raises AdapterRefusedError."""
    return LoraReader(parse_json(text)).read()


def parse_json(text: str | bytes, name: str = CONFIG_FILE) -> dict[str, Any]:
    """Return the object in a file of an adapter; raises AdapterRefusedError."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterRefusedError(f"{name} is not valid JSON") from error
    if not isinstance(document, dict):
        raise AdapterRefusedError(f"{name} is not a JSON object")
    return document


class LoraReader:
    """Takes the values of one configuration, checking each."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def read(self) -> LoraOptions:
        """Return the options; raises AdapterRefusedError."""
        self._refuse()
        options = LoraOptions(
            rank=self._rank("r", self._get("r", 8)),
            alpha=finite_number("lora_alpha", self._get("lora_alpha", 8)),
            use_rslora=self._flag("use_rslora"),
            use_dora=self._flag("use_dora"),
            lora_bias=self._flag("lora_bias"),
            bias=self._get("bias", "none"),
            rank_pattern=self._pattern("rank_pattern", self._rank),
            alpha_pattern=self._pattern("alpha_pattern", finite_number),
            target_modules=self._names_or_regex("target_modules"),
            exclude_modules=self._names_or_regex("exclude_modules"),
            layers_to_transform=self._layers(),
            layers_pattern=self._layers_pattern(),
            modules_to_save=_names("modules_to_save", self._get("modules_to_save", [])),
            token_indices=self._token_indices(),
            ensure_weight_tying=self._flag("ensure_weight_tying"),
            invocation_ids=self._invocation_ids(),
            trained_class=self._trained_class(),
            trained_on=self._trained_on(),
            task=self._document.get("task_type"),
            target_parameters=_names("target_parameters", self._get("target_parameters", [])),
        )
        _check_together(options)
        return options

    def _refuse(self) -> None:
        # The type first: the other options of another type would only confuse.
        for name in ("peft_type", *self._document):
            sentence = refuse_option(name, self._document.get(name))
            if sentence is not None:
                raise AdapterRefusedError(sentence)

    def _get(self, name: str, default: Any) -> Any:
        assert name in BY_NAME  # so that nothing is read that is not in the table
        value = self._document.get(name)
        return default if value is None else value

    def _flag(self, name: str) -> bool:
        value = self._get(name, False)
        if not isinstance(value, bool):
            raise _wrong(name, value, "true or false")
        return value

    @staticmethod
    def _rank(name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise _wrong(name, value, "a positive whole number")
        return value

    def _pattern(self, name: str, check: Callable[[str, Any], T]) -> dict[str, T]:
        value = self._get(name, {})
        if not isinstance(value, dict) or len(value) > _MAX_NAMES:
            raise _wrong(name, value, "an object of at most 20,000 module names")
        _names(name, list(value))
        return {key: check(f"{name}[{shorten(key)}]", each) for key, each in value.items()}

    def _names_or_regex(self, name: str) -> str | tuple[str, ...]:
        value = self._get(name, [])
        if isinstance(value, str) and len(value) <= _MAX_NAME_LENGTH:
            return value
        return _names(name, value)

    def _layers(self) -> tuple[int, ...] | None:
        value = self._get("layers_to_transform", [])
        layers = value if isinstance(value, list) else [value]
        if len(layers) > _MAX_NAMES or any(type(each) is not int for each in layers):
            raise _wrong("layers_to_transform", value, "a layer's number or a list of them")
        return tuple(layers) or None

    def _layers_pattern(self) -> tuple[str, ...]:
        value = self._get("layers_pattern", [])
        if isinstance(value, str):
            value = [value] if value else []
        return _names("layers_pattern", value)

    def _token_indices(self) -> dict[str, tuple[int, ...]]:
        value = self._get("trainable_token_indices", {})
        by_module = {"": value} if isinstance(value, list) else value
        if not isinstance(by_module, dict):
            raise _wrong("trainable_token_indices", value, "a list, or an object of lists")
        _names("trainable_token_indices", list(by_module))
        return {name: _token_ids(ids) for name, ids in by_module.items()}

    def _invocation_ids(self) -> tuple[int, ...]:
        name = "alora_invocation_tokens"
        value = self._get(name, [])
        if not isinstance(value, list) or len(value) > _MAX_INVOCATION:
            raise _wrong(name, value, f"a list of at most {_MAX_INVOCATION:,} token ids")
        if any(type(each) is not int or each < 0 for each in value):
            raise _wrong(name, value, "a list of token ids")
        others = [other for other in _NOT_ACTIVATED if self._document.get(other)]
        if self._document.get("init_lora_weights") == "mica":
            others.append("init_lora_weights='mica'")
        if value and others:
            raise AdapterRefusedError(f"{name} and {others[0]} exclude each other in PEFT; use one")
        return tuple(value)

    def _trained_class(self) -> str:
        mapping = self._get("auto_mapping", {})
        name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
        return name if isinstance(name, str) else ""

    def _trained_on(self) -> str:
        name = self._get("base_model_name_or_path", "")
        return name if isinstance(name, str) else ""


def _wrong(name: str, value: Any, wanted: str) -> AdapterRefusedError:
    return AdapterRefusedError(
        f"{name} of adapter_config.json is {shorten(value)}; it must be {wanted}"
    )


def finite_number(name: str, value: Any) -> float:
    """Return a value that must be a finite number; raises AdapterRefusedError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, value, "a number")
    # JSON as Python reads it has NaN, Infinity and whole numbers of any size.
    if not abs(value) < 1e30:
        raise _wrong(name, value, "a finite number")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _MAX_NAMES:
        raise _wrong(name, value, "a list of at most 20,000 names")
    for each in value:
        if not isinstance(each, str) or len(each) > _MAX_NAME_LENGTH:
            raise _wrong(name, each, "names of at most 2,000 characters")
    return tuple(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    name = "trainable_token_indices"
    if not isinstance(value, list) or any(type(each) is not int or each < 0 for each in value):
        raise _wrong(name, value, "a list of token ids")
    if len(set(value)) != len(value):
        raise _wrong(name, value, "a list without repetitions")
    return tuple(value)


def _check_together(options: LoraOptions) -> None:
    """Refuse combinations that PEFT refuses."""
    if not options.target_modules and not options.target_parameters:
        raise AdapterRefusedError(
            "target_modules is missing in adapter_config.json; name the modules that it adapts"
        )
    if isinstance(options.target_modules, str) and (
        options.layers_to_transform is not None or options.layers_pattern
    ):
        raise AdapterRefusedError(
            "layers_to_transform and layers_pattern need target_modules to be a list of names"
        )
    if options.lora_bias and options.use_dora:
        raise AdapterRefusedError("lora_bias and use_dora exclude each other in PEFT; use one")
    if options.layers_pattern and options.layers_to_transform is None:
        raise AdapterRefusedError("layers_pattern needs layers_to_transform")
