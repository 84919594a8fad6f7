"""Values of the core as plain ones for JSON, and back: any dataclass, field by field.

Whatever a value has is taken along; what is a client's text, or the size of a step, is left out
by name. A field that comes to one of these types is so recorded by itself.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any

from lorax_contract.step import (
    NewRow,
    RequestSpec,
    SamplingParams,
    StepOutcome,
    StoppingParams,
    TokenColumns,
)
from lorax_router.core.request import RequestTerms


class ValueFormatError(ValueError):
    """A value is of a type that the log does not know."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Way:
    """How one field is written and read where that is not as any other."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _tokens(number: int) -> range:
    """Return as many token ids as there were; which they were is said by the blocks' keys."""
    return range(number)


# The core asks for none of them: what a client wants said, or not said, is its own affair.
LEFT_OUT = {
    (RequestSpec, "constraint"),
    (RequestSpec, "trace"),
    (SamplingParams, "logit_bias"),
    (StoppingParams, "stop_sequences"),
    (StepOutcome, "details"),
    (StepOutcome, "drafted"),
    (StepOutcome, "failure"),
}
# The core counts these, and compares their blocks by names: docs/simulator.md.
WAYS = {
    (RequestSpec, "prompt_ids"): _Way(len, _tokens),
    (RequestSpec, "resumed_ids"): _Way(len, _tokens),
    (NewRow, "spec"): _Way(lambda spec: spec.request_id, lambda number: number),
    (NewRow, "output_ids"): _Way(len, _tokens),
    (StepOutcome, "tokens"): _Way(
        lambda tokens: len(tokens.ids), lambda number: TokenColumns(ids=[0] * number)
    ),
    (StepOutcome, "inactive"): _Way(list, lambda handles: dict.fromkeys(handles, "")),
}
_ATOMS = (int, str, bool, type(None))


class ValueWriter:
    """Makes plain values.

    Args:
        secret: what salts are hashed with; never written.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._fields: dict[type, list[tuple[str, Callable[[Any], Any]]]] = {}

    def plain(self, value: Any) -> Any:
        """Return a value as numbers, texts, lists and dicts."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if kind is float:
            return value if math.isfinite(value) else repr(value)
        if kind is list:
            # Columns have a number for each row: they are not looked at one by one.
            return value if value and type(value[0]) in (int, bool) else [*map(self.plain, value)]
        if isinstance(value, Enum):
            return value.value
        if dataclasses.is_dataclass(kind):
            return {name: write(getattr(value, name)) for name, write in self._fields_of(kind)}
        if isinstance(value, collections.abc.Mapping):
            return {str(self.plain(key)): self.plain(each) for key, each in value.items()}
        if isinstance(value, collections.abc.Set):
            return sorted(map(self.plain, value))
        if isinstance(value, collections.abc.Sequence) and kind is not bytes:
            return [*map(self.plain, value)]
        raise ValueFormatError(f"{kind.__name__} is no type that the log of events knows")

    def _fields_of(self, kind: type) -> list[tuple[str, Callable[[Any], Any]]]:
        if kind not in self._fields:
            self._fields[kind] = [
                (field.name, self._way(kind, field.name))
                for field in dataclasses.fields(kind)
                if (kind, field.name) not in LEFT_OUT
            ]
        return self._fields[kind]

    def _way(self, kind: type, name: str) -> Callable[[Any], Any]:
        if (kind, name) == (RequestTerms, "cache_salt"):
            return self._hashed
        way = WAYS.get((kind, name))
        return self.plain if way is None else way.write

    def _hashed(self, text: str) -> str:
        return self.digest(text.encode()) if text else ""

    def digest(self, data: bytes) -> str:
        """Return eight bytes, in hex, that are equal where the data are, in this log alone."""
        return blake2b(data, key=self._secret, digest_size=8).hexdigest()


def typed(kind: Any, value: Any) -> Any:
    """Return the value of a type that a plain one stands for."""
    return _reader(kind)(value)


@lru_cache(maxsize=1024)
def _reader(kind: Any) -> Callable[[Any], Any]:
    if isinstance(kind, typing.NewType):
        return _reader(kind.__supertype__)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        others = [each for each in arguments if each is not types.NoneType]
        return partial(_read_optional, _reader(others[0]))
    if origin is typing.Literal or kind in (int, str, bool, Any):
        return _same
    if kind is float:
        return float
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return partial(_read_fields, kind)
    if origin is tuple:
        return partial(_read_items, tuple, _reader(arguments[0]))
    if origin in (list, collections.abc.Sequence, collections.abc.Collection):
        return partial(_read_items, list, _reader(arguments[0]))
    if origin in (set, frozenset):
        return partial(_read_items, origin, _reader(arguments[0]))
    if origin in (dict, collections.abc.Mapping):
        return partial(_read_mapping, _key_reader(arguments[0]), _reader(arguments[1]))
    raise ValueFormatError(f"{kind} is no type that the log of events knows")


def _key_reader(kind: Any) -> Callable[[Any], Any]:
    """Return what reads keys, which are texts in JSON."""
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    return int if kind is int else _reader(kind)


def _same(value: Any) -> Any:
    return value


def _read_optional(read: Callable[[Any], Any], value: Any) -> Any:
    return None if value is None else read(value)


def _read_items(make: Any, read: Callable[[Any], Any], values: Sequence[Any]) -> Any:
    return make(values) if read is _same else make(map(read, values))


def _read_mapping(read_key: Any, read: Callable[[Any], Any], values: dict[str, Any]) -> Any:
    return {read_key(key): read(each) for key, each in values.items()}


def _read_fields(kind: type, values: dict[str, Any]) -> Any:
    readers = _field_readers(kind)
    if unknown := values.keys() - readers.keys():
        raise ValueFormatError(
            f"{kind.__name__} has no {', '.join(sorted(unknown))} in this version"
        )
    return kind(**{name: readers[name](each) for name, each in values.items()})


@lru_cache(maxsize=256)
def _field_readers(kind: type) -> dict[str, Callable[[Any], Any]]:
    hints = typing.get_type_hints(kind)
    readers: dict[str, Callable[[Any], Any]] = {}
    for field in dataclasses.fields(kind):
        if (kind, field.name) not in LEFT_OUT:
            way = WAYS.get((kind, field.name))
            readers[field.name] = _reader(hints[field.name]) if way is None else way.read
    return readers
