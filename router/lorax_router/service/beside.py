"""Work that is done beside other work."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")


async def all_of(works: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Return what works come to, in their order; the first that fails ends the others."""
    if len(works) == 1:
        # Nobody runs beside it.
        return [await works[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
