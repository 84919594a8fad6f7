"""Errors of ours between processes: class, both texts and every field that an error has.

A class that the other process does not know arrives as the nearest of its bases that it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from lorax_contract.adapters import Reason
from lorax_contract.errors import ErrorKind, LoraxError
from lorax_contract.exit_codes import ExitCode

# What fields of errors hold beside plain values.
_VALUES: dict[str, type] = {kind.__name__: kind for kind in (ErrorKind, ExitCode, Reason)}


class Fault(msgspec.Struct, frozen=True, array_like=True):
    """One error on its way."""

    # The class and its bases, the nearest first.
    kinds: list[str]
    text: str
    # A value of each field, and the name of its type where it is no plain one.
    fields: dict[str, tuple[str, Any]]


def pack_fault(error: LoraxError) -> Fault:
    """Return what crosses of an error."""
    kinds = [each.__name__ for each in type(error).__mro__ if issubclass(each, LoraxError)]
    fields = {name: _packed(value) for name, value in vars(error).items() if name[:2] != "__"}
    return Fault(kinds, str(error), fields)


def unpack_fault(fault: Fault) -> LoraxError:
    """Return the error that was packed."""
    known = {each.__name__: each for each in _tree(LoraxError)}
    kind = next(known[name] for name in fault.kinds if name in known)
    error = kind.__new__(kind)
    error.args = (fault.text,)
    vars(error).update({name: _unpacked(*packed) for name, packed in fault.fields.items()})
    return error


def _packed(value: Any) -> tuple[str, Any]:
    name = type(value).__name__
    return (name, msgspec.to_builtins(value)) if name in _VALUES else ("", value)


def _unpacked(name: str, value: Any) -> Any:
    return msgspec.convert(value, _VALUES[name]) if name else value


def _tree(kind: type[LoraxError]) -> Iterator[type[LoraxError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _tree(each)
