"""The commit lane of FakeShard: calls run one after the other, in the order of their numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from lorax_contract.errors import ShardError, ShardUnavailableError
from lorax_contract.step import StepOutcome
from lorax_router.shards.fake.memory import FakeShardError

# How many replies are kept for callers who repeat a sequence number.
REPLIES_KEPT = 8

Reply = StepOutcome | None


class CommitLane:
    """Runs each sequence number once, from 1 on, and keeps the replies for repeated calls."""

    def __init__(self, max_depth: int) -> None:
        self._max_depth = max_depth
        self._next_seq = 1
        self._turns: dict[int, asyncio.Future[None]] = {}
        self._replies: dict[int, asyncio.Task[Reply]] = {}
        self._arrived: set[int] = set()
        self._arrivals = asyncio.Condition()

    async def run(self, seq: int, work: Callable[[], Awaitable[Reply]]) -> Reply:
        """Run ``work`` when ``seq`` is next; a repeated number gets the first one's reply.

        The caller may give up and ask again: the work runs on.
        """
        reply = self._replies.get(seq)
        if reply is None:
            self._refuse_unexpected(seq)
            reply = self._replies[seq] = asyncio.create_task(self._in_turn(seq, work))
            reply.add_done_callback(_retrieve)
            await self._note_arrival(seq)
        try:
            return await asyncio.shield(reply)
        except asyncio.CancelledError:
            if reply.cancelled():
                raise ShardUnavailableError(f"the shard stopped in step {seq}") from None
            raise

    async def arrived(self, seq: int) -> None:
        """Wait until the call with this number has arrived."""
        async with self._arrivals:
            await self._arrivals.wait_for(lambda: seq in self._arrived)

    async def stop(self) -> None:
        """Cancel all calls and wait until they ended."""
        self.cancel()
        await asyncio.gather(*self._replies.values(), return_exceptions=True)

    def cancel(self) -> None:
        """Make all unanswered calls fail with ShardUnavailableError."""
        for reply in self._replies.values():
            reply.cancel()

    def _refuse_unexpected(self, seq: int) -> None:
        if seq < self._next_seq:
            raise ShardError(f"the reply of sequence number {seq} is not kept any more")
        if seq >= self._next_seq + self._max_depth:
            raise FakeShardError(
                f"sequence number {seq} came while {self._next_seq} is next: "
                f"more than {self._max_depth} calls are in flight"
            )

    async def _note_arrival(self, seq: int) -> None:
        async with self._arrivals:
            self._arrived.add(seq)
            self._arrivals.notify_all()

    async def _in_turn(self, seq: int, work: Callable[[], Awaitable[Reply]]) -> Reply:
        if seq != self._next_seq:
            turn = self._turns[seq] = asyncio.get_running_loop().create_future()
            await turn
        try:
            return await work()
        finally:
            self._next_seq = seq + 1
            self._replies.pop(seq - REPLIES_KEPT, None)
            turn_after = self._turns.pop(seq + 1, None)
            if turn_after is not None and not turn_after.done():
                turn_after.set_result(None)


def _retrieve(reply: asyncio.Task[Reply]) -> None:
    """Look at a failure that nobody waits for any more, so that asyncio does not report it."""
    with suppress(asyncio.CancelledError):
        reply.exception()
