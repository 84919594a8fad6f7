"""Work that any number of callers wait for: begun for the first, ended when the last leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class FlightEnded(Exception):
    """What a caller waits for was ended, and not by that caller."""


@dataclass(eq=False, slots=True)
class _Flight(Generic[T]):
    task: asyncio.Task[T]
    num_waiting: int = 0


class Flights(Generic[T]):
    """Tasks by key. Used from one event loop."""

    def __init__(self) -> None:
        # Those that a caller may join.
        self._open: dict[Hashable, _Flight[T]] = {}
        # Those and others that were given up and have not ended yet.
        self._tasks: set[asyncio.Task[T]] = set()

    async def join(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what comes of ``key``; ``start`` makes the work if nobody waits for it yet.

        Raises what the work raises, and FlightEnded when all were ended.
        """
        flight = self._open.get(key)
        if flight is None:
            flight = self._open[key] = _Flight(asyncio.create_task(start()))
            self._tasks.add(flight.task)
            flight.task.add_done_callback(lambda task: self._ended(key, task))
        flight.num_waiting += 1
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if flight.task.cancelled():
                raise FlightEnded from None
            raise
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0:
                # Whoever asks from now on starts anew.
                self._remove(key, flight.task)
                flight.task.cancel()

    async def end(self) -> None:
        """End all work and wait until it is over."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, key: Hashable, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        self._remove(key, task)

    def _remove(self, key: Hashable, task: asyncio.Task[T]) -> None:
        """Let nobody join a task any more; another one may have its key by now."""
        flight = self._open.get(key)
        if flight is not None and flight.task is task:
            del self._open[key]
