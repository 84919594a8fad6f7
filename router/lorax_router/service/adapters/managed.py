"""What was managed by hand, as one server tells it another: names, pins and loads, without tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_contract.adapters import AdapterRef
from lorax_router.service.adapters.registry import Pin, Remembered


@dataclass(frozen=True, slots=True)
class ManagedName:
    """A name of the operator's choosing."""

    name: str
    ref: AdapterRef
    # Unix time.
    created_at: float
    # Whether its adapter took a token, which is not told.
    is_private: bool


@dataclass(frozen=True, slots=True)
class ManagedAdapters:
    """All that was managed by hand at a server and still holds."""

    names: tuple[ManagedName, ...] = ()
    pins: tuple[Pin, ...] = ()
    # Loaded and not pinned, the latest last.
    loads: tuple[AdapterRef, ...] = ()

    @classmethod
    def of(cls, remembered: Remembered) -> ManagedAdapters:
        """Return what a server remembers."""
        names = tuple(
            ManagedName(
                each.name, each.target.refs[0], each.created_at,
                each.name in remembered.private_names,
            )
            for each in remembered.names
        )  # fmt: skip
        return cls(names, remembered.pins, remembered.loads)


@dataclass(frozen=True, slots=True)
class TakenBack:
    """What was managed by hand and is not any more."""

    # Names, and when what they stood for was given them: what is younger stays.
    names: dict[str, float] = field(default_factory=dict)
    pins: tuple[Pin, ...] = ()
    loads: tuple[AdapterRef, ...] = ()
