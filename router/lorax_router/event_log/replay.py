"""Makes the plans of a log again, and finds the first that is another."""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson

from lorax_router.core.prefix import BlockNames
from lorax_router.core.request import RequestState
from lorax_router.core.scheduler import Scheduler
from lorax_router.core.settings import make_scheduler
from lorax_router.event_log.form import EventLogReader, LoggedEvent
from lorax_router.event_log.values import ValueFormatError, ValueWriter, typed

# Calls whose result is a step.
_PLANS = ("plan", "plan_behind")
_MAX_SHOWN = 400


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a replay."""

    num_events: int
    num_plans: int
    # The first plan or other result that is not as in the log; "": all are.
    difference: str
    # Why the log ends; None: it is torn.
    end: str | None


class _LoggedNames(BlockNames):
    """Names blocks as the log does: the tokens are not known."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self._keys: dict[int, list[int]] = {}

    def learn(self, event: LoggedEvent) -> None:
        """Take the names that were made during an event."""
        for request_id, keys in event.keys.items():
            self._keys.setdefault(request_id, []).extend(keys)

    def key(self, request: RequestState, number: int, before: int) -> int:
        """Return the name of a block."""
        keys = self._keys.get(request.request_id, [])
        if number >= len(keys):
            raise _NotLoggedError(
                f"block {number} of request {request.request_id} is looked for, and then it was not"
            )
        return keys[number]

    def content(self, request: RequestState, number: int) -> bytes:
        """Return what stands for a block's tokens: its name."""
        return self.key(request, number, 0).to_bytes(8)


class _NotLoggedError(Exception):
    """Something is asked for that nobody asked for when the log was written."""


def replay(path: Path) -> Replayed:
    """Feed a log to a scheduler; raises EventLogError for a file that cannot be read."""
    reader = EventLogReader(path)
    names = _LoggedNames(reader.settings.block_size)
    player = _Player(make_scheduler(reader.settings, names))
    num_events = num_plans = 0
    for event in reader.events():
        names.learn(event)
        num_events += 1
        num_plans += event.call in _PLANS and event.result is not None
        if difference := player.play(event):
            return Replayed(num_events, num_plans, difference, reader.end)
    return Replayed(num_events, num_plans, "", reader.end)


class _Player:
    """Calls a scheduler as it was called then."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._values = ValueWriter(b"")
        self._kinds: dict[str, dict[str, Any]] = {}

    def play(self, event: LoggedEvent) -> str:
        """Return how an event differs from what it was; "": in nothing."""
        where = f"event {event.number}, {event.call}"
        if "now" in event.given:
            where += f" at {event.given['now']:.6f} s"
        try:
            method = attrgetter(event.call)(self._scheduler)
            given = self._typed(event.call, method, event.given)
        except (AttributeError, KeyError, TypeError, ValueFormatError) as error:
            return f"{where}: this version does not know it: {error}"
        try:
            result, error_name = method(**given), ""
        except _NotLoggedError as error:
            return f"{where}: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it was, it is compared
            result, error_name = None, type(error).__name__
        if error_name != event.error:
            then, now = event.error or "none", error_name or "none"
            return f"{where}: it ended by the exception {then} in the log, by {now} here"
        plain = orjson.loads(
            orjson.dumps(self._values.plain(result), option=orjson.OPT_NON_STR_KEYS)
        )
        if plain == event.result:
            return ""
        if event.call in _PLANS:
            where += f" ({_step(event.result)} in the log, {_step(plain)} here)"
        return f"{where}: {_first_difference(event.result, plain)}"

    def _typed(self, call: str, method: Any, given: dict[str, Any]) -> dict[str, Any]:
        if call not in self._kinds:
            hints = typing.get_type_hints(method)
            self._kinds[call] = {name: hints[name] for name in inspect.signature(method).parameters}
        kinds = self._kinds[call]
        return {name: typed(kinds[name], value) for name, value in given.items()}


def _step(plan: Any) -> str:
    return "no step" if plan is None else f"step {plan['seq']}"


def _first_difference(then: Any, now: Any, path: str = "") -> str:
    """Say where two plain values begin to differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in [*then, *(each for each in now if each not in then)]:
            if name not in then or name not in now:
                return f"{path}{name} is only {'here' if name in now else 'in the log'}"
            if then[name] != now[name]:
                return _first_difference(then[name], now[name], f"{path}{name}: ")
    if isinstance(then, list) and isinstance(now, list):
        for number, (one, other) in enumerate(zip(then, now)):
            if one != other:
                return _first_difference(one, other, f"{path}entry {number}: ")
        longer = max(then, now, key=len)
        where = "in the log" if longer is then else "here"
        number = min(len(then), len(now))
        return f"{path}entry {number} is only {where}: {_shown(longer[number])}"
    return f"{path}{_shown(then)} in the log, {_shown(now)} here"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
