"""Names of the operator's own choosing, each of which stands for an adapter of a source.

An alias is a name like any other in lists, pins and metrics, and two names with one content
share it. What is different: everybody may use it, whatever token opened the adapter, because
the operator said so; and it stays until the operator takes it back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from lorax_contract.adapters import (
    ALIAS_SOURCE,
    SOURCES,
    AdapterRef,
    AdapterUnavailableError,
)
from lorax_contract.errors import ValidationError
from lorax_router.service.adapters.catalog import AdapterSelection
from lorax_router.service.adapters.managed import Stamp

_MAX_ALIASES = 16_384
_PREFIXES = tuple(f"{source}:" for source in (*SOURCES, ALIAS_SOURCE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """One name and what it stands for."""

    name: str
    # One adapter of a source, with the token that opens it.
    target: AdapterSelection
    # When it was given.
    stamp: Stamp = field(default_factory=lambda: Stamp(time.time()))

    @property
    def created_at(self) -> float:
        """When it was given: Unix time."""
        return self.stamp.at

    @property
    def ref(self) -> AdapterRef:
        """The name among all names."""
        return AdapterRef(source=ALIAS_SOURCE, id=self.name)

    @property
    def selection(self) -> AdapterSelection:
        """What a request selects that gives this name."""
        return AdapterSelection(refs=(self.ref,))


class AliasBook:
    """Owns the aliases; AdapterManager changes them, everybody reads them.

    Args:
        reserved: names that mean something else, those of the base model.
    """

    def __init__(self, reserved: Iterable[str] = ()) -> None:
        self._reserved = frozenset(reserved)
        self._aliases: dict[str, Alias] = {}
        # Told of each name that means something from now on, or nothing more.
        self.watchers: set[Callable[[str, bool], None]] = set()

    def __iter__(self) -> Iterator[Alias]:
        return iter([*self._aliases.values()])

    def find(self, name: str) -> Alias | None:
        """Return the alias of a name, None if there is none."""
        return self._aliases.get(name)

    def stands_for(self, name: str) -> str | None:
        """Return the adapter that a name stands for, as ``place_key`` has it; None: no such name."""
        alias = self.find(name)
        return None if alias is None else str(alias.target.refs[0].plain)

    def make(self, name: str, target: AdapterSelection) -> Alias:
        """Return a checked alias, which is not put into the book; raises ValidationError.

        One that stands for an alias stands for what that stands for.
        """
        if not name or name.strip() != name:
            raise ValidationError(
                "an adapter's name must not be empty or begin or end with a space"
            )
        if name in self._reserved:
            raise ValidationError(f"{name!r} is a name of the base model; choose another one")
        if name.startswith(_PREFIXES) or "://" in name:
            raise ValidationError(
                f"the name {name!r} begins like the name of a source; choose another one"
            )
        try:
            AdapterRef.of(ALIAS_SOURCE, name)
        except AdapterUnavailableError as error:
            raise ValidationError(error.text) from error
        if target.refs[0].source == ALIAS_SOURCE:
            known = self.find(target.refs[0].id)
            if known is None:
                raise ValidationError(f"there is no adapter named {target.refs[0].id!r}")
            target = known.target
        return Alias(name=name, target=target)

    def put(self, alias: Alias) -> None:
        """Add an alias, or let its name stand for something else from now on."""
        if alias.name not in self._aliases and len(self._aliases) >= _MAX_ALIASES:
            raise ValidationError(f"there are {_MAX_ALIASES} names already, as many as may be")
        self._aliases[alias.name] = alias
        self._tell(alias.name)

    def drop(self, name: str) -> Alias | None:
        """Take a name back; returns what it was."""
        dropped = self._aliases.pop(name, None)
        self._tell(name)
        return dropped

    def _tell(self, name: str) -> None:
        for each in self.watchers:
            each(name, name in self._aliases)
