"""Hypothesis strategies for any value of a type, by its annotations."""

from __future__ import annotations

import collections.abc
import dataclasses
import types
import typing
from enum import Enum
from typing import Any

from hypothesis import strategies as st

# What JSON of a client's can hold, numbers beyond 64 bits among them.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
_ATOMS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=12),
    bool: st.booleans(),
    bytes: st.binary(max_size=12),
    types.NoneType: st.none(),
    Any: JSON,
}


def any_of(kind: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Any value of a type; ``fields`` of a dataclass are drawn from these instead."""
    if kind in _ATOMS:
        return _ATOMS[kind]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = [each.name for each in dataclasses.fields(kind) if each.name not in fields]
        return st.builds(kind, **{name: any_of(hints[name]) for name in names}, **fields)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from(kind)
    return _of_several(typing.get_origin(kind), typing.get_args(kind))


def _of_several(origin: Any, arguments: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    inner = [any_of(each) for each in arguments if each is not ...]
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*inner)
    if origin in (dict, collections.abc.Mapping):
        return st.dictionaries(inner[0], inner[1], max_size=3)
    if origin is tuple and ... not in arguments:
        return st.tuples(*inner)
    items = st.lists(inner[0], max_size=3)
    return items.map(tuple) if origin is tuple else items
