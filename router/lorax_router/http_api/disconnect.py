"""Ends work for a client that has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

Result = TypeVar("Result")
Work = Coroutine[Any, Any, Result]


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer."""


async def while_present(receive: Receive, work: Work[Result], *companions: Work[None]) -> Result:
    """Run ``work`` with its ``companions`` beside it; all end when it does.

    When the client leaves, everything is cancelled and ClientGoneError raised. The
    body of the request must have been read to its end.
    """
    try:
        async with asyncio.TaskGroup() as group:
            beside = [group.create_task(each) for each in (_raise_when_gone(receive), *companions)]
            try:
                return await work
            finally:
                for task in beside:
                    task.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _raise_when_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGoneError
