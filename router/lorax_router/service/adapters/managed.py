"""What was managed by hand, as servers tell it each other: names, pins, loads, without tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lorax_contract.adapters import AdapterRef


class ManagedKind(Enum):
    """What was managed."""

    # A name of the operator's choosing.
    NAME = "name"
    PIN = "pin"
    LOAD = "load"
    # Its source was asked anew. That holds for ever.
    RELOAD = "reload"


# What a change is about.
ManagedKey = tuple[ManagedKind, AdapterRef, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagedChange:
    """The last that was done by hand about one thing: it holds since then, or is taken back.

    Of two about one thing the later one is true. So all who tell each other come to know the same,
    whoever tells it, in whichever order and however often.
    """

    kind: ManagedKind
    # The adapter; of a name, the name among all names.
    ref: AdapterRef
    # Unix time.
    at: float
    holds: bool = True
    # Who keeps what is pinned; the empty one is the operator.
    tenant: str = ""
    # What a name stands for.
    target: AdapterRef | None = None
    # Whether its adapter took a token, which is not told.
    is_private: bool = False

    @property
    def key(self) -> ManagedKey:
        """What it is about."""
        return self.kind, self.ref, self.tenant
