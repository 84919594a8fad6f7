"""Stands before a scheduler and notes each call that may change what it will plan."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

from lorax_router.core.prefix import BlockNames
from lorax_router.core.request import RequestState
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.settings import CoreSettings, make_scheduler

# What is only asked, by the part of the core that answers: everything else is recorded, what
# comes to the core later included.
QUERIES = {
    "Scheduler": {"check", "groups", "service_here", "stats"},
    "AdapterTable": {
        "admitting", "capacity", "check", "check_possible", "find", "in_play", "is_resident",
        "overdue", "snapshot",
    },
    "Backlog": {"check"},
}  # fmt: skip
_CORE = "lorax_router.core."


class Event(NamedTuple):
    """One call of the core, and what came of it."""

    # Dotted, from the scheduler on.
    call: str
    given: dict[str, Any]
    result: Any
    # The name of the exception that ended it; "": none.
    error: str
    # Keys of blocks that were made meanwhile, by request, in their order.
    keys: Sequence[tuple[int, int]]


class EventSink(Protocol):
    """Takes events; never raises, never waits."""

    def put(self, event: Event) -> None:
        """Note an event; its values are not changed any more."""


class RecordingNames(BlockNames):
    """Names blocks by their tokens, and notes each key once, when it is made."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self._made: list[tuple[int, int]] = []

    def key(self, request: RequestState, number: int, before: int) -> int:
        """Return a hash of a block's tokens and of the key before it."""
        key = super().key(request, number, before)
        self._made.append((request.request_id, key))
        return key

    def take(self) -> Sequence[tuple[int, int]]:
        """Return the keys that were made since the last call."""
        if not self._made:
            return ()
        made, self._made = self._made, []
        return made


class _Recorded:
    """Stands for one part of the core; calls from outside are noted, those within are not."""

    def __init__(self, part: Any, path: str, names: RecordingNames, sink: EventSink) -> None:
        vars(self).update(_part=part, _path=path, _names=names, _sink=sink)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        kind = type(value)
        if inspect.ismethod(value):
            if name in QUERIES.get(type(self._part).__name__, ()):
                return value
            value = self._noted(value, self._path + name)
        elif kind.__module__.startswith(_CORE) and not dataclasses.is_dataclass(kind):
            value = _Recorded(value, f"{self._path}{name}.", self._names, self._sink)
        else:
            return value
        # It is looked up once.
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"{self._path}{name} is changed by a method of the core, or no log of events tells it"
        )

    def __contains__(self, key: Any) -> bool:
        return key in self._part

    def __getitem__(self, key: Any) -> Any:
        return self._part[key]

    def _noted(self, method: Callable[..., Any], path: str) -> Callable[..., Any]:
        parameters = list(inspect.signature(method).parameters)
        take, put = self._names.take, self._sink.put

        def noted(*args: Any, **kwargs: Any) -> Any:
            try:
                result = method(*args, **kwargs)
            except Exception as error:
                given = dict(zip(parameters, args), **kwargs)
                put(Event(path, given, None, type(error).__name__, take()))
                raise
            put(Event(path, dict(zip(parameters, args), **kwargs), result, "", take()))
            return result

        return noted


def recorded_scheduler(settings: CoreSettings, sink: EventSink) -> Scheduler:
    """Return a scheduler whose calls are noted; within, it is as fast as any."""
    names = RecordingNames(settings.block_size)
    scheduler = make_scheduler(settings, names)
    return cast(Scheduler, _Recorded(scheduler, "", names, sink))
