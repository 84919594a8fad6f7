"""What one server would know that does all changes one after the other, in the plainest words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lorax_contract.adapters import AdapterRef
from lorax_router.service.adapters.managed import ManagedChange, ManagedKind
from lorax_router.service.adapters.registry import Remembered


@dataclass
class Held:
    """Names, pins and loads that there are."""

    names: dict[str, AdapterRef | None] = field(default_factory=dict)
    pins: set[tuple[AdapterRef, str]] = field(default_factory=set)
    loads: set[AdapterRef] = field(default_factory=set)

    def do(self, change: ManagedChange) -> None:
        """Do what a call says, as the last one so far."""
        ref, tenant = change.ref, change.tenant
        match change.kind:
            case ManagedKind.NAME:
                self.names[ref.id] = change.target
            case ManagedKind.PIN:
                self.pins.add((ref, tenant))
            case ManagedKind.LOAD:
                self.loads.add(ref)
            case ManagedKind.UNPIN:
                self.pins -= {
                    each for each in self.pins if each[0] == ref and tenant in ("", each[1])
                }
            case ManagedKind.UNLOAD:
                if ref.source == "alias":
                    self.names.pop(ref.id, None)
                self.pins -= {each for each in self.pins if each[0] == ref}
                self.loads.discard(ref)


def single_writer(changes: Iterable[ManagedChange]) -> Held:
    """Do all changes in the order of their stamps."""
    held = Held()
    for each in sorted(changes, key=lambda each: each.stamp):
        held.do(each)
    return held


def held_of(remembered: Remembered) -> Held:
    """What a server says that it knows."""
    return Held(
        {each.name: each.target.refs[0] for each in remembered.names},
        {(each.ref, each.tenant) for each in remembered.pins},
        {*remembered.loads},
    )
