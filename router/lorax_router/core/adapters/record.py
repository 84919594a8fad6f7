"""One adapter as the scheduler knows it: its states, the table of transitions, its record."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lorax_contract.step import AdapterHandle


class AdapterState(Enum):
    """Where an adapter stands on the shards."""

    ABSENT = "absent"
    PREPARING = "preparing"
    RESIDENT = "resident"
    RELEASING = "releasing"


class AdapterEvent(Enum):
    """What happens to an adapter."""

    PREPARE = "prepare"
    PREPARED = "prepared"
    FAILED = "failed"
    EVICT = "evict"
    RELEASED = "released"


TRANSITIONS = {
    (AdapterState.ABSENT, AdapterEvent.PREPARE): AdapterState.PREPARING,
    (AdapterState.PREPARING, AdapterEvent.PREPARED): AdapterState.RESIDENT,
    # On some rank it may be all the same: it is released like any other.
    (AdapterState.PREPARING, AdapterEvent.FAILED): AdapterState.RELEASING,
    (AdapterState.RESIDENT, AdapterEvent.EVICT): AdapterState.RELEASING,
    (AdapterState.RELEASING, AdapterEvent.RELEASED): AdapterState.ABSENT,
}


class IllegalTransitionError(Exception):
    """An event came in a state in which it cannot happen."""


@dataclass(slots=True)
class AdapterRecord:
    """One adapter. Owned by the AdapterTable; others only read it."""

    handle: AdapterHandle
    nbytes: int
    # Equal for those that compute the same, whatever their handles; "": no other does.
    content: str = ""
    # The largest of its modules; 0: not known.
    rank: int = 0
    is_pinned: bool = False
    is_retired: bool = False
    # Wanted apart from requests, until it was prepared or could not be.
    is_called: bool = False
    # Whose requests asked for it last.
    tenant: str = ""
    state: AdapterState = AdapterState.ABSENT
    num_waiting: int = 0
    num_running: int = 0
    num_uses: int = 0
    # Losses of the shards while it was being prepared, since it last was.
    num_losses: int = 0
    worth: float = 0.0
    prepare_s: float = 1.0
    # When it began to wait for a slot, to be prepared, to be resident, to be drained.
    wanted_at: float | None = None
    ordered_at: float = 0.0
    resident_at: float = 0.0
    drained_at: float | None = None
    # When a request first got a token since it is resident.
    progressed_at: float | None = None
    last_used_at: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no request that runs or waits needs it now."""
        return not (self.num_waiting or self.num_running)

    @property
    def is_wanted(self) -> bool:
        """Whether it should be on the shards although no request needs it now."""
        return self.is_pinned or self.is_called

    @property
    def is_evictable(self) -> bool:
        """Whether its slot may be taken: idle, or drained of running rows."""
        if self.is_pinned or self.num_running or self.state is not AdapterState.RESIDENT:
            return False
        return not self.num_waiting or self.drained_at is not None


@dataclass(frozen=True, slots=True)
class AdapterCapacity:
    """The room for adapters on the shards; what comes and what goes holds some, too."""

    max_resident: int
    num_held: int
    # On the fullest rank; None: only slots count.
    max_bytes: int | None
    bytes_held: int


@dataclass(slots=True)
class Orders:
    """What the engine loop does on the prepare lane, for one incarnation of the shards."""

    epoch: int = 1
    prepare: list[AdapterHandle] = field(default_factory=list)
    release: list[AdapterHandle] = field(default_factory=list)
