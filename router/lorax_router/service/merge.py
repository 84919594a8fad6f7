"""Several asynchronous iterators read as one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")


class Merge(Generic[Item]):
    """Yields (number of its source, item) as items come, until all sources have ended.

    What a source raises is raised. One reader, which calls ``aclose`` when it stops; the
    sources are closed by whoever owns them.
    """

    def __init__(self, sources: Sequence[AsyncIterator[Item]]) -> None:
        self._sources = sources
        self._num_open = len(sources)
        self._awaited: dict[asyncio.Task[Item | None], int] = {}
        self._ready: deque[tuple[int, Item]] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Item]:
        if len(self._sources) == 1:
            # The hot path: nothing between the source and its reader.
            return 0, await anext(self._sources[0])
        while not self._ready:
            if not self._num_open:
                raise StopAsyncIteration
            await self._wait()
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Wait for nothing any more."""
        self._num_open = 0
        waiting = list(self._awaited)
        self._awaited.clear()
        for task in waiting:
            task.cancel()
        if waiting:
            # A source is free only when nobody is in it; one more failure tells nothing new.
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _wait(self) -> None:
        """Wait until a source has something; what came at once is in the order of the sources."""
        if not self._awaited:
            for number in range(len(self._sources)):
                self._expect(number)
        done, _ = await asyncio.wait(self._awaited, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=self._awaited.__getitem__):
            number, item = self._awaited.pop(task), task.result()
            if item is None:
                self._num_open -= 1
            else:
                self._ready.append((number, item))
                self._expect(number)

    def _expect(self, number: int) -> None:
        self._awaited[asyncio.ensure_future(self._next(number))] = number

    async def _next(self, number: int) -> Item | None:
        """Return the next item; None at the end, since a task cannot carry StopAsyncIteration."""
        return await anext(self._sources[number], None)
